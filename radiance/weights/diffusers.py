"""The layout of diffusers' `ChromaTransformer2DModel`: native names in the first column, theirs in the second.

A native tensor is theirs, one below the other. diffusers has no class for pixel models, nor for what only ours can do.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from radiance import config
from radiance.weights.files import CheckpointError, Shapes


def linear(native: str, *theirs: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(f"{native}.{kind}", tuple(f"{name}.{kind}" for name in theirs)) for kind in ("weight", "bias")]


def norms(native: str, query: str, key: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(f"{native}.query_norm.scale", (f"{query}.weight",)), (f"{native}.key_norm.scale", (f"{key}.weight",))]


DOUBLE, ATTENTION = "double_blocks.{i}", "transformer_blocks.{i}.attn"
SINGLE, THEIR_SINGLE = "single_blocks.{i}", "single_transformer_blocks.{i}"
TABLE: list[tuple[str, tuple[str, ...]]] = [
    *linear("img_in", "x_embedder"),
    *linear("txt_in", "context_embedder"),
    *linear("distilled_guidance_layer.in_proj", "distilled_guidance_layer.in_proj"),
    *linear("distilled_guidance_layer.layers.{i}.in_layer", "distilled_guidance_layer.layers.{i}.linear_1"),
    *linear("distilled_guidance_layer.layers.{i}.out_layer", "distilled_guidance_layer.layers.{i}.linear_2"),
    ("distilled_guidance_layer.norms.{i}.scale", ("distilled_guidance_layer.norms.{i}.weight",)),
    *linear("distilled_guidance_layer.out_proj", "distilled_guidance_layer.out_proj"),
    *linear(f"{DOUBLE}.img_attn.qkv", f"{ATTENTION}.to_q", f"{ATTENTION}.to_k", f"{ATTENTION}.to_v"),
    *norms(f"{DOUBLE}.img_attn.norm", f"{ATTENTION}.norm_q", f"{ATTENTION}.norm_k"),
    *linear(f"{DOUBLE}.img_attn.proj", f"{ATTENTION}.to_out.0"),
    *linear(f"{DOUBLE}.img_mlp.0", "transformer_blocks.{i}.ff.net.0.proj"),
    *linear(f"{DOUBLE}.img_mlp.2", "transformer_blocks.{i}.ff.net.2"),
    *linear(f"{DOUBLE}.txt_attn.qkv", f"{ATTENTION}.add_q_proj", f"{ATTENTION}.add_k_proj", f"{ATTENTION}.add_v_proj"),
    *norms(f"{DOUBLE}.txt_attn.norm", f"{ATTENTION}.norm_added_q", f"{ATTENTION}.norm_added_k"),
    *linear(f"{DOUBLE}.txt_attn.proj", f"{ATTENTION}.to_add_out"),
    *linear(f"{DOUBLE}.txt_mlp.0", "transformer_blocks.{i}.ff_context.net.0.proj"),
    *linear(f"{DOUBLE}.txt_mlp.2", "transformer_blocks.{i}.ff_context.net.2"),
    *linear(f"{SINGLE}.linear1", *(f"{THEIR_SINGLE}.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))),
    *linear(f"{SINGLE}.linear2", f"{THEIR_SINGLE}.proj_out"),
    *norms(f"{SINGLE}.norm", f"{THEIR_SINGLE}.attn.norm_q", f"{THEIR_SINGLE}.attn.norm_k"),
    *linear("final_layer.linear", "proj_out"),
]
SIGN = "distilled_guidance_layer.layers.0.linear_1.weight"  # a tensor that only this layout has
BLOCK = re.compile(r"\.(\d+)\.")

_ROWS = dict(TABLE)


def theirs(native: str) -> tuple[str, ...]:
    """Their names of a native tensor."""
    index = BLOCK.search(native) if native.startswith(("double", "single", "distilled")) else None
    pattern = BLOCK.sub(".{i}.", native, count=1) if index else native
    return tuple(name.format(i=index[1] if index else "") for name in _ROWS[pattern])


def parts(native: str, shape: tuple[int, ...], model: config.Model) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Their tensors of a native one: its rows, and the shape."""
    names = theirs(native)
    rows = [model.hidden] * (len(names) - 1)
    bounds = np.cumsum([0, *rows, shape[0] - sum(rows)])
    return {name: (slice(a, b), (int(b - a), *shape[1:])) for name, a, b in zip(names, bounds, bounds[1:])}


def to_native(shapes: Shapes) -> dict[str, tuple[str, ...]]:
    """Native name → their names, of all tensors of a file. Raises CheckpointError that names what has no place."""
    found, left = {}, set(shapes)
    for native, names in TABLE:
        for i in _counter(native):
            here = tuple(name.format(i=i) for name in names)
            if not any(name in shapes for name in here):
                break
            if missing := [name for name in here if name not in shapes]:
                raise CheckpointError(f"The diffusers checkpoint has no {', '.join(missing)}: it is not whole.")
            found[native.format(i=i)] = here
            left -= set(here)
    if left:
        raise CheckpointError(f"The diffusers checkpoint holds tensors that are not Chroma's: {', '.join(sorted(left))}.")
    return found


def _counter(native: str) -> Iterator[int]:
    i = 0
    while i == 0 or "{i}" in native:
        yield i
        i += 1


def joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of tensors one below the other. Raises CheckpointError when they do not fit."""
    if len(shapes) == 1:
        return shapes[0]
    if any(s[1:] != shapes[0][1:] or not s for s in shapes):
        told = ", ".join(str(list(s)) for s in shapes)
        raise CheckpointError(f"The diffusers checkpoint has parts of one matrix that do not fit to each other, of shapes {told}.")
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def join(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def check(model: config.Model):
    """Raises CheckpointError for a model that diffusers has no class for."""
    needs = dict(
        head="linear", modulation="approximator", prediction="velocity", text_ids="zero", padding="encoder", registers=0, text_preamble=0,
        mlp_ratio=4.0, rope_theta=10_000.0,
    )  # fmt: skip
    if model.patch > 1:
        raise CheckpointError(
            "diffusers has no class for pixel models such as Radiance (its Chroma reads latents): write --to native, which ComfyUI and "
            "stable-diffusion.cpp open, or --to torch, a PyTorch module of its own."
        )
    for name, value in needs.items():
        if getattr(model, name) != value:
            raise CheckpointError(
                f"diffusers' Chroma cannot do model.{name}={getattr(model, name)} (only {value}): write --to native or --to torch."
            )


def class_config(model: config.Model) -> dict[str, Any]:
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


def known(their_config: Any) -> dict[str, Any]:
    """What their config.json says that shapes do not."""
    axes = their_config.get("axes_dims_rope") if isinstance(their_config, Mapping) else None
    return {"rope_axes": tuple(axes)} if isinstance(axes, list) else {}
