"""The tensor names of diffusers' `ChromaTransformer2DModel`, and how native tensors map to them.

A native tensor is one diffusers tensor, or several concatenated along the outputs (axis 0).
diffusers has no class for pixel models, nor for the variants that only this project has.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights.names import strip_prefix
from radiance.weights.tensors import TensorShapes


def map_linear(native: str, *diffusers_names: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the rows of weight and bias of a linear layer.

    Args:
        native: Native name of the layer.
        *diffusers_names: Names of the layers that the native layer consists of.
    """
    return [
        (f"{native}.{kind}", tuple(f"{name}.{kind}" for name in diffusers_names))
        for kind in ("weight", "bias")
    ]


def map_qk_norms(native: str, query: str, key: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the rows of the norms of queries and keys.

    Args:
        native: Native name of the two norms.
        query: The norm of the queries in diffusers.
        key: The norm of the keys in diffusers.
    """
    return [
        (f"{native}.query_norm.scale", (f"{query}.weight",)),
        (f"{native}.key_norm.scale", (f"{key}.weight",)),
    ]


NATIVE_DOUBLE, DIFFUSERS_ATTENTION = "double_blocks.{i}", "transformer_blocks.{i}.attn"
NATIVE_SINGLE, DIFFUSERS_SINGLE = "single_blocks.{i}", "single_transformer_blocks.{i}"
# native name, diffusers names; {i} is the index of a block
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
# Only this layout has a tensor of this name.
SIGNATURE_TENSOR = "distilled_guidance_layer.layers.0.linear_1.weight"
BLOCK_INDEX_PATTERN = re.compile(r"\.(\d+)\.")
# Settings of the models that diffusers can run.
SUPPORTED_SETTINGS = {
    "head": "linear",
    "modulation": "approximator",
    "prediction": "velocity",
    "text_ids": "zero",
    "padding": "encoder",
    "registers": 0,
    "text_refiner_blocks": 0,
    "mlp_ratio": 4.0,
    "rope_theta": 10_000.0,
}

_NAMES_BY_NATIVE = dict(DIFFUSERS_TABLE)


def to_diffusers_names(native: str) -> tuple[str, ...]:
    """Return the diffusers names of a native tensor.

    Args:
        native: Name of the native tensor.

    Returns:
        One name, or the names of the parts, in order.

    Raises:
        KeyError: diffusers has no such tensor.
    """
    is_indexed = native.startswith(("double", "single", "distilled"))
    match = BLOCK_INDEX_PATTERN.search(native) if is_indexed else None
    if match is None:
        return _NAMES_BY_NATIVE[native]
    pattern = BLOCK_INDEX_PATTERN.sub(".{i}.", native, count=1)
    return tuple(name.format(i=match[1]) for name in _NAMES_BY_NATIVE[pattern])


def locate_diffusers_slices(
    native: str, shape: tuple[int, ...], model: config.Model
) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Return the rows and the shape of each diffusers tensor of a native tensor.

    Args:
        native: Name of the native tensor.
        shape: Shape of the native tensor.
        model: The model, whose width is the size of every part but the last.
    """
    names = to_diffusers_names(native)
    row_counts = [model.hidden] * (len(names) - 1)
    row_bounds = np.cumsum([0, *row_counts, shape[0] - sum(row_counts)])
    return {
        name: (slice(start, stop), (int(stop - start), *shape[1:]))
        for name, start, stop in zip(names, row_bounds, row_bounds[1:])
    }


def has_diffusers_names(names: Iterable[str]) -> bool:
    """Return True if tensors have the names of diffusers' Chroma, with any prefix."""
    return any(name.endswith(SIGNATURE_TENSOR) for name in names)


def map_to_native(
    shapes: TensorShapes, origin: object = "The diffusers checkpoint"
) -> dict[str, tuple[str, ...]]:
    """Return the keys of the diffusers tensors of each native tensor of a file.

    Args:
        shapes: Names and shapes of the file's tensors.
        origin: The file that errors name.

    Raises:
        CheckpointError: A part of a tensor is missing, or a tensor is unknown. The message names
            all such tensors.
    """
    keys = strip_prefix(shapes, (SIGNATURE_TENSOR,), origin)
    mapping, unmatched = {}, set(keys)
    for native, names in DIFFUSERS_TABLE:
        for i in _block_indices(native):
            diffusers_names = tuple(name.format(i=i) for name in names)
            if not any(name in keys for name in diffusers_names):
                break
            if missing := [name for name in diffusers_names if name not in keys]:
                raise CheckpointError(
                    f"{origin} has no {', '.join(missing)}, so it is incomplete: copy or download "
                    "it again."
                )
            mapping[native.format(i=i)] = tuple(keys[name] for name in diffusers_names)
            unmatched -= set(diffusers_names)
    if unmatched:
        raise CheckpointError(
            f"{origin} holds tensors that Chroma does not have: {', '.join(sorted(unmatched))}."
        )
    return mapping


def _block_indices(native: str) -> Iterator[int]:
    """Yield 0, 1, 2, … for a tensor of the blocks, and 0 for any other tensor."""
    i = 0
    while i == 0 or "{i}" in native:
        yield i
        i += 1


def check_diffusers_support(model: config.Model) -> None:
    """Check that diffusers has a class for a model.

    Args:
        model: The model to export.

    Raises:
        CheckpointError: diffusers cannot run the model. The message names a format that can.
    """
    if model.patch > 1:
        raise CheckpointError(
            "diffusers has no class for pixel models such as Radiance (its Chroma reads latents): "
            "use --to native, which ComfyUI and stable-diffusion.cpp open, or --to torch, a "
            "self-contained PyTorch module; for a LoRA, --to peft or kohya."
        )
    for name, value in SUPPORTED_SETTINGS.items():
        if getattr(model, name) != value:
            raise CheckpointError(
                f"Chroma in diffusers does not support model.{name}={getattr(model, name)} "
                f"(only {value}): use --to native or --to torch."
            )


def make_transformer_config(model: config.Model) -> dict[str, Any]:
    """Return the config.json that `ChromaTransformer2DModel.from_pretrained` reads."""
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
    """Return the model settings that a config.json gives and tensor shapes do not.

    Args:
        diffusers_config: The decoded content of config.json, which may be of any type.
    """
    if not isinstance(diffusers_config, Mapping):
        return {}
    rope_axes = diffusers_config.get("axes_dims_rope")
    return {"rope_axes": tuple(rope_axes)} if isinstance(rope_axes, list) else {}
