"""The native format: the published checkpoints' own tensor names and layouts, and their place in our tree.

One table runs both ways. A row names a native tensor and the leaves that make it up; most have one, the fused matrices of
single blocks have two. `{i}` is the index of a block, which in our tree is axis 0 of a stacked leaf.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from radiance import config
from radiance.model.transformer import Params, abstract
from radiance.weights.detect import check_shapes, markers
from radiance.weights.files import CheckpointError, Packed, Shapes, finite

Tensor = Callable[[str], np.ndarray | Packed]
Store = Callable[[str, tuple[int, ...], Iterator[np.ndarray | Packed]], Any]


class Part(NamedTuple):
    path: str  # in our tree
    layout: str = "same"


class Row(NamedTuple):
    native: str
    parts: tuple[Part, ...]
    axis: int = 0  # along which the parts lie in the native tensor
    when: Callable[[config.Model], bool] = lambda model: True


# layout: our leaf → native tensor. The way back is a reshape to the leaf's shape, after the transposition below.
TO_NATIVE = {
    "same": lambda x: x,
    "flat": lambda x: x.reshape(-1),
    "matrix": lambda x: x.reshape(x.shape[0], -1).T,  # [in, *out] → [out, in]
    "heads": lambda x: x.reshape(-1, x.shape[-1]).T,  # [*in, out] → [out, in]
    "patch": lambda x, side: x.reshape(side, side, -1, x.shape[-1]).transpose(3, 2, 0, 1),  # [p·p·c, d] → [d, c, p, p]
    "conv": lambda x: x.transpose(3, 2, 0, 1),  # [height, width, in, out] → [out, in, height, width]
}
TO_TREE = {
    "same": lambda x: x,
    "flat": lambda x: x,
    "matrix": lambda x: x.T,
    "heads": lambda x: x.T,
    "patch": lambda x: x.transpose(2, 3, 1, 0),
    "conv": lambda x: x.transpose(2, 3, 1, 0),
}


def linear(native: str, path: str, layout: str = "matrix", when: Callable[[config.Model], bool] = lambda model: True) -> list[Row]:
    """Weight and bias of a linear layer or convolution."""
    return [
        Row(f"{native}.weight", (Part(f"{path}/kernel", layout),), when=when),
        Row(f"{native}.bias", (Part(f"{path}/bias", "flat"),), when=when),
    ]


def stream(native: str, path: str) -> list[Row]:
    """One side of the double blocks, or the blocks of text alone."""
    return [
        *linear(f"{native}_attn.qkv", f"{path}/attention/qkv"),
        Row(f"{native}_attn.norm.query_norm.scale", (Part(f"{path}/attention/query_norm/scale"),)),
        Row(f"{native}_attn.norm.key_norm.scale", (Part(f"{path}/attention/key_norm/scale"),)),
        *linear(f"{native}_attn.proj", f"{path}/attention/proj", "heads"),
        *linear(f"{native}_mlp.0", f"{path}/mlp/linear_in"),
        *linear(f"{native}_mlp.2", f"{path}/mlp/linear_out"),
    ]


def embedder(native: str, path: str) -> list[Row]:
    return linear(f"{native}.in_layer", f"modulation/condition/{path}/linear_in") + linear(
        f"{native}.out_layer", f"modulation/condition/{path}/linear_out"
    )


def modulated_by(kind: str) -> Callable[[config.Model], bool]:
    return lambda model: model.modulation == kind


def ends_in(head: str) -> Callable[[config.Model], bool]:
    return lambda model: model.head == head


def offsets(kind: str) -> list[Row]:
    """Learned vectors, which only our own models have."""
    return [
        Row(f"{where}.modulation_{name}", (Part(f"modulation/{path}"),), when=modulated_by(kind))
        for where, name, path in (
            ("double_blocks.{i}", "img", "double_image"),
            ("double_blocks.{i}", "txt", "double_text"),
            ("single_blocks.{i}", "offset", "single"),
            ("final_layer", "offset", "output"),
        )
    ]


TABLE: list[Row] = [
    *linear("img_in_patch", "patch_embed", "patch", when=lambda model: model.patch > 1),
    *linear("img_in", "patch_embed", when=lambda model: model.patch == 1),
    Row("img_in_bottleneck.in_layer.weight", (Part("patch_embed/linear_in/kernel", "patch"),)),
    *linear("img_in_bottleneck.out_layer", "patch_embed/linear_out"),
    *linear("txt_in", "text_embed"),
    Row("txt_padding", (Part("padding"),)),
    Row("registers", (Part("registers"),)),
    *linear("distilled_guidance_layer.in_proj", "modulation/proj_in"),
    *linear("distilled_guidance_layer.layers.{i}.in_layer", "modulation/layers/linear_in"),
    *linear("distilled_guidance_layer.layers.{i}.out_layer", "modulation/layers/linear_out"),
    Row("distilled_guidance_layer.norms.{i}.scale", (Part("modulation/layers/norm/scale"),)),
    *linear("distilled_guidance_layer.out_proj", "modulation/proj_out"),
    *embedder("time_in", "time"),
    *embedder("guidance_in", "guidance"),
    *embedder("vector_in", "pooled"),
    *linear("double_blocks.{i}.img_mod.lin", "modulation/double_image", when=modulated_by("per_block")),
    *linear("double_blocks.{i}.txt_mod.lin", "modulation/double_text", when=modulated_by("per_block")),
    *linear("single_blocks.{i}.modulation.lin", "modulation/single", when=modulated_by("per_block")),
    *linear("final_layer.adaLN_modulation.1", "modulation/output", when=modulated_by("per_block")),
    *linear("shared_modulation.lin", "modulation/linear", when=modulated_by("shared")),
    *offsets("shared"),
    *offsets("none"),
    *stream("text_blocks.{i}.txt", "preamble"),
    *stream("double_blocks.{i}.img", "double/image"),
    *stream("double_blocks.{i}.txt", "double/text"),
    Row("single_blocks.{i}.linear1.weight", (Part("single/attention/qkv/kernel", "matrix"), Part("single/mlp/linear_in/kernel", "matrix"))),
    Row("single_blocks.{i}.linear1.bias", (Part("single/attention/qkv/bias", "flat"), Part("single/mlp/linear_in/bias"))),
    Row("single_blocks.{i}.linear2.weight", (Part("single/attention/proj/kernel", "heads"), Part("single/mlp/linear_out/kernel", "matrix")), axis=1),
    Row("single_blocks.{i}.linear2.bias", (Part("single/mlp/linear_out/bias"),)),
    Row("single_blocks.{i}.norm.query_norm.scale", (Part("single/attention/query_norm/scale"),)),
    Row("single_blocks.{i}.norm.key_norm.scale", (Part("single/attention/key_norm/scale"),)),
    *linear("nerf_image_embedder.embedder.0", "head/embedder"),
    *linear("nerf_blocks.{i}.param_generator", "head/blocks/param_generator"),
    Row("nerf_blocks.{i}.norm.scale", (Part("head/blocks/norm/scale"),)),
    Row("nerf_final_layer_conv.norm.scale", (Part("head/norm/scale"),), when=ends_in("nerf_conv")),
    *linear("nerf_final_layer_conv.conv", "head/conv", "conv"),
    Row("nerf_final_layer.norm.scale", (Part("head/norm/scale"),), when=ends_in("nerf_linear")),
    *linear("nerf_final_layer.linear", "head/linear", when=ends_in("nerf_linear")),
    *linear("final_layer.linear", "head/linear", when=ends_in("linear")),
]  # fmt: skip


# --- the table, for one model -----------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where a native tensor's values lie in our tree."""

    row: Row
    index: int | None  # of the block; None for a tensor that stands alone


def layout(model: config.Model) -> tuple[dict[str, tuple[int, ...]], dict[str, Source]]:
    """Shapes and sources of all native tensors of `model`, in the published order of names; markers have no source."""
    leaves = flatten(abstract(model))
    shapes: dict[str, tuple[int, ...]] = {name: (0,) for name in markers(model)}
    sources: dict[str, Source] = {}
    covered: set[str] = set()
    for row in TABLE:
        paths = [part.path for part in row.parts]
        if not row.when(model) or any(path not in leaves for path in paths):
            continue
        covered.update(paths)
        stacked = "{i}" in row.native
        join = partial(_join, row, 0 if stacked else None, model=model)
        shape = jax.eval_shape(join, {path: leaves[path] for path in paths}).shape
        for i in range(leaves[paths[0]].shape[0]) if stacked else [None]:
            name = row.native.format(i=i)
            shapes[name], sources[name] = shape, Source(row, i)
    if missing := set(leaves) - covered:
        raise AssertionError(f"The table has no row for {sorted(missing)}.")
    return shapes, sources


def _join(row: Row, index: int | None, leaves: Mapping, *, model: config.Model):
    """The native tensor from our leaves; works on NumPy and (abstract) JAX arrays."""
    xs = []
    for path, kind in row.parts:
        x = leaves[path] if index is None else leaves[path][index]
        xs.append(TO_NATIVE[kind](x, _patch_side(model)) if kind == "patch" else TO_NATIVE[kind](x))
    if len(xs) == 1:
        return xs[0]
    return (np if isinstance(xs[0], np.ndarray) else jax.numpy).concatenate(xs, axis=row.axis)


def _patch_side(model: config.Model) -> int:
    return model.patch // 2 if model.patch_embed == "conv_half" else model.patch


def flatten(tree: Params) -> dict[str, jax.Array]:
    """Leaves by slash-separated path."""
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


# --- there and back ---------------------------------------------------------------------------------------------------


def from_native(model: config.Model, shapes: Shapes, tensor: Tensor, origin: object, store: Store | None = None) -> Params:
    """Our tree from native tensors; `tensor(name)` reads one.

    store: makes a leaf from its path, its shape and its blocks (see `float32_leaf`, which is used when None); those of Packed
    tensors are Packed, and still [out, in]. Raises CheckpointError that names every tensor that is missing, not expected, or of
    another shape.
    """
    expected, sources = layout(model)
    check_shapes(expected, shapes, origin)
    skeleton = abstract(model)
    leaves = flatten(skeleton)
    by_path: dict[str, list[tuple[str, Source]]] = {path: [] for path in leaves}
    for name, source in sources.items():
        for part in source.row.parts:
            by_path[part.path].append((name, source))

    def blocks(path: str) -> Iterator[np.ndarray | Packed]:
        for name, (row, index) in by_path[path]:
            values = tensor(name)
            packed = isinstance(values, Packed)
            if not (values.finite() if packed else finite(values)):
                raise CheckpointError(f"{origin}: {name} holds values that are not finite: the file is damaged.")
            shape = leaves[path].shape if index is None else leaves[path].shape[1:]
            part = _split(row, path, values, expected[name], leaves)
            yield part if packed else TO_TREE[dict(row.parts)[path]](part).reshape(shape)

    store = store or float32_leaf
    values = [store(path, leaves[path].shape, blocks(path)) for path in leaves]
    return jax.tree_util.tree_unflatten(jax.tree.structure(skeleton), values)


def float32_leaf(path: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> jax.Array:
    """The blocks one behind the other (or the one that is the leaf) on the first device."""
    return jax.numpy.asarray(stacked(shape, blocks, np.dtype(np.float32)))


def stacked(shape: tuple[int, ...], blocks: Iterator[np.ndarray], dtype: np.dtype) -> np.ndarray:
    out = np.empty(shape, dtype)
    for i, block in enumerate(blocks):
        out[i if block.ndim < out.ndim else ...] = block
    return out


def _split(row: Row, path: str, tensor: np.ndarray | Packed, shape: tuple[int, ...], leaves: Mapping) -> np.ndarray | Packed:
    """The part of a native tensor that belongs to `path`."""
    sizes = [
        math.prod(leaves[p].shape[1:] if "{i}" in row.native else leaves[p].shape) * shape[row.axis] // math.prod(shape)
        for p, _ in row.parts
    ]
    at = [p for p, _ in row.parts].index(path)
    begin, end = sum(sizes[:at]), sum(sizes[: at + 1])
    if len(row.parts) == 1:
        return tensor
    if isinstance(tensor, Packed):
        return tensor.part(row.axis, begin, end)
    return tensor[(slice(None),) * row.axis + (slice(begin, end),)]


def to_native(model: config.Model, params: Params) -> tuple[Shapes, Callable[[str], np.ndarray]]:
    """Shapes of the native tensors of `params`, markers first, and what makes one of them."""
    shapes, sources = layout(model)
    leaves = flatten(params)

    def tensor(name: str) -> np.ndarray:
        if name not in sources:
            return np.zeros(0, np.float32)
        row, index = sources[name]
        parts = {p: np.asarray(leaves[p] if index is None else leaves[p][index]) for p, _ in row.parts}
        return _join(row, None, parts, model=model)

    return shapes, tensor
