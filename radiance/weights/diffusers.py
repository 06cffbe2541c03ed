"""The layout of diffusers' `ChromaTransformer2DModel`: native names in the first column, theirs in the second.

A native tensor is theirs, one below the other. diffusers has no class for pixel models, nor for what only ours can do.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights.tensors import TensorShapes


def map_linear(native: str, *diffusers_names: str) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (f"{native}.{kind}", tuple(f"{name}.{kind}" for name in diffusers_names))
        for kind in ("weight", "bias")
    ]


def map_qk_norms(native: str, query: str, key: str) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (f"{native}.query_norm.scale", (f"{query}.weight",)),
        (f"{native}.key_norm.scale", (f"{key}.weight",)),
    ]


NATIVE_DOUBLE, DIFFUSERS_ATTENTION = "double_blocks.{i}", "transformer_blocks.{i}.attn"
NATIVE_SINGLE, DIFFUSERS_SINGLE = "single_blocks.{i}", "single_transformer_blocks.{i}"
DIFFUSERS_TABLE: list[tuple[str, tuple[str, ...]]] = [
    *map_linear("img_in", "x_embedder"),
    *map_linear("txt_in", "context_embedder"),
    *map_linear("distilled_guidance_layer.in_proj", "distilled_guidance_layer.in_proj"),
    *map_linear(
        "distilled_guidance_layer.layers.{i}.in_layer",
        "distilled_guidance_layer.layers.{i}.linear_1",
    ),
    *map_linear(
        "distilled_guidance_layer.layers.{i}.out_layer",
        "distilled_guidance_layer.layers.{i}.linear_2",
    ),
    ("distilled_guidance_layer.norms.{i}.scale", ("distilled_guidance_layer.norms.{i}.weight",)),
    *map_linear("distilled_guidance_layer.out_proj", "distilled_guidance_layer.out_proj"),
    *map_linear(
        f"{NATIVE_DOUBLE}.img_attn.qkv",
        f"{DIFFUSERS_ATTENTION}.to_q",
        f"{DIFFUSERS_ATTENTION}.to_k",
        f"{DIFFUSERS_ATTENTION}.to_v",
    ),
    *map_qk_norms(
        f"{NATIVE_DOUBLE}.img_attn.norm",
        f"{DIFFUSERS_ATTENTION}.norm_q",
        f"{DIFFUSERS_ATTENTION}.norm_k",
    ),
    *map_linear(f"{NATIVE_DOUBLE}.img_attn.proj", f"{DIFFUSERS_ATTENTION}.to_out.0"),
    *map_linear(f"{NATIVE_DOUBLE}.img_mlp.0", "transformer_blocks.{i}.ff.net.0.proj"),
    *map_linear(f"{NATIVE_DOUBLE}.img_mlp.2", "transformer_blocks.{i}.ff.net.2"),
    *map_linear(
        f"{NATIVE_DOUBLE}.txt_attn.qkv",
        f"{DIFFUSERS_ATTENTION}.add_q_proj",
        f"{DIFFUSERS_ATTENTION}.add_k_proj",
        f"{DIFFUSERS_ATTENTION}.add_v_proj",
    ),
    *map_qk_norms(
        f"{NATIVE_DOUBLE}.txt_attn.norm",
        f"{DIFFUSERS_ATTENTION}.norm_added_q",
        f"{DIFFUSERS_ATTENTION}.norm_added_k",
    ),
    *map_linear(f"{NATIVE_DOUBLE}.txt_attn.proj", f"{DIFFUSERS_ATTENTION}.to_add_out"),
    *map_linear(f"{NATIVE_DOUBLE}.txt_mlp.0", "transformer_blocks.{i}.ff_context.net.0.proj"),
    *map_linear(f"{NATIVE_DOUBLE}.txt_mlp.2", "transformer_blocks.{i}.ff_context.net.2"),
    *map_linear(
        f"{NATIVE_SINGLE}.linear1",
        *(f"{DIFFUSERS_SINGLE}.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    ),
    *map_linear(f"{NATIVE_SINGLE}.linear2", f"{DIFFUSERS_SINGLE}.proj_out"),
    *map_qk_norms(
        f"{NATIVE_SINGLE}.norm",
        f"{DIFFUSERS_SINGLE}.attn.norm_q",
        f"{DIFFUSERS_SINGLE}.attn.norm_k",
    ),
    *map_linear("final_layer.linear", "proj_out"),
]
SIGNATURE_TENSOR = (
    "distilled_guidance_layer.layers.0.linear_1.weight"  # a tensor that only this layout has
)
BLOCK_INDEX_PATTERN = re.compile(r"\.(\d+)\.")

_DIFFUSERS_PATTERNS = dict(DIFFUSERS_TABLE)


def to_diffusers_names(native: str) -> tuple[str, ...]:
    """Their names of a native tensor."""
    index_match = (
        BLOCK_INDEX_PATTERN.search(native)
        if native.startswith(("double", "single", "distilled"))
        else None
    )
    pattern = BLOCK_INDEX_PATTERN.sub(".{i}.", native, count=1) if index_match else native
    return tuple(
        name.format(i=index_match[1] if index_match else "")
        for name in _DIFFUSERS_PATTERNS[pattern]
    )


def locate_diffusers_slices(
    native: str, shape: tuple[int, ...], model: config.Model
) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Their tensors of a native one: its rows, and the shape."""
    names = to_diffusers_names(native)
    row_counts = [model.hidden] * (len(names) - 1)
    row_bounds = np.cumsum([0, *row_counts, shape[0] - sum(row_counts)])
    return {
        name: (slice(start, stop), (int(stop - start), *shape[1:]))
        for name, start, stop in zip(names, row_bounds, row_bounds[1:])
    }


def map_to_native(shapes: TensorShapes) -> dict[str, tuple[str, ...]]:
    """Native name → their names, of all tensors of a file. Raises CheckpointError that names what has no place."""
    mapping, unmatched = {}, set(shapes)
    for native, names in DIFFUSERS_TABLE:
        for i in _block_indices(native):
            diffusers_names = tuple(name.format(i=i) for name in names)
            if not any(name in shapes for name in diffusers_names):
                break
            if missing := [name for name in diffusers_names if name not in shapes]:
                raise CheckpointError(
                    f"The diffusers checkpoint has no {', '.join(missing)}: it is not whole."
                )
            mapping[native.format(i=i)] = diffusers_names
            unmatched -= set(diffusers_names)
    if unmatched:
        raise CheckpointError(
            f"The diffusers checkpoint holds tensors that are not Chroma's: {', '.join(sorted(unmatched))}."
        )
    return mapping


def _block_indices(native: str) -> Iterator[int]:
    i = 0
    while i == 0 or "{i}" in native:
        yield i
        i += 1


def check_diffusers_support(model: config.Model):
    """Raises CheckpointError for a model that diffusers has no class for."""
    required = dict(
        head="linear", modulation="approximator", prediction="velocity", text_ids="zero", padding="encoder", registers=0, text_refiner_blocks=0,
        mlp_ratio=4.0, rope_theta=10_000.0,
    )  # fmt: skip
    if model.patch > 1:
        raise CheckpointError(
            "diffusers has no class for pixel models such as Radiance (its Chroma reads latents): write --to native, which ComfyUI and "
            "stable-diffusion.cpp open, or --to torch, a PyTorch module of its own."
        )
    for name, value in required.items():
        if getattr(model, name) != value:
            raise CheckpointError(
                f"diffusers' Chroma cannot do model.{name}={getattr(model, name)} (only {value}): write --to native or --to torch."
            )


def make_transformer_config(model: config.Model) -> dict[str, Any]:
    """The config.json that `ChromaTransformer2DModel.from_pretrained` reads."""
    return {
        "_class_name": "ChromaTransformer2DModel",
        "_diffusers_version": "0.38.0",
        "patch_size": 1,
        "in_channels": model.channels,
        "out_channels": None,
        "num_layers": model.double_blocks,
        "num_single_layers": model.single_blocks,
        "attention_head_dim": model.head_dim,
        "num_attention_heads": model.heads,
        "joint_attention_dim": model.text_dim,
        "axes_dims_rope": list(model.rope_axes),
        "approximator_num_channels": model.approximator_dim,
        "approximator_hidden_dim": model.approximator_hidden,
        "approximator_layers": model.approximator_depth,
    }


def parse_transformer_config(diffusers_config: Any) -> dict[str, Any]:
    """What their config.json says that shapes do not."""
    rope_axes = (
        diffusers_config.get("axes_dims_rope") if isinstance(diffusers_config, Mapping) else None
    )
    return {"rope_axes": tuple(rope_axes)} if isinstance(rope_axes, list) else {}
