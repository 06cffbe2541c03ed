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
from radiance.base.errors import CheckpointError
from radiance.base.trees import flatten_tree
from radiance.model.transformer import Params, make_abstract_params
from radiance.weights.detect import check_shapes, model_markers
from radiance.weights.tensors import QuantizedTensor, TensorShapes, is_finite

TensorGetter = Callable[[str], np.ndarray | QuantizedTensor]
LeafMaker = Callable[[str, tuple[int, ...], Iterator[np.ndarray | QuantizedTensor]], Any]


class TensorSlice(NamedTuple):
    path: str  # in our tree
    layout: str = "same"


class NativeRule(NamedTuple):
    native_name: str
    slices: tuple[TensorSlice, ...]
    axis: int = 0  # along which the parts lie in the native tensor
    applies_to: Callable[[config.Model], bool] = lambda model: True


# layout: our leaf → native tensor. The way back is a reshape to the leaf's shape, after the transposition below.
LAYOUT_TO_NATIVE = {
    "same": lambda x: x,
    "flat": lambda x: x.reshape(-1),
    "matrix": lambda x: x.reshape(x.shape[0], -1).T,  # [in, *out] → [out, in]
    "heads": lambda x: x.reshape(-1, x.shape[-1]).T,  # [*in, out] → [out, in]
    "patch": lambda x, side: x.reshape(side, side, -1, x.shape[-1]).transpose(
        3, 2, 0, 1
    ),  # [p·p·c, d] → [d, c, p, p]
    "conv": lambda x: x.transpose(
        3, 2, 0, 1
    ),  # [height, width, in, out] → [out, in, height, width]
}
LAYOUT_TO_LEAF = {
    "same": lambda x: x,
    "flat": lambda x: x,
    "matrix": lambda x: x.T,
    "heads": lambda x: x.T,
    "patch": lambda x: x.transpose(2, 3, 1, 0),
    "conv": lambda x: x.transpose(2, 3, 1, 0),
}


def linear_rules(
    native_prefix: str,
    path: str,
    layout: str = "matrix",
    applies_to: Callable[[config.Model], bool] = lambda model: True,
) -> list[NativeRule]:
    """Weight and bias of a linear layer or convolution."""
    return [
        NativeRule(
            f"{native_prefix}.weight",
            (TensorSlice(f"{path}/kernel", layout),),
            applies_to=applies_to,
        ),
        NativeRule(
            f"{native_prefix}.bias", (TensorSlice(f"{path}/bias", "flat"),), applies_to=applies_to
        ),
    ]


def stream_rules(native_prefix: str, path: str) -> list[NativeRule]:
    """One side of the double blocks, or the blocks of text alone."""
    return [
        *linear_rules(f"{native_prefix}_attn.qkv", f"{path}/attention/qkv"),
        NativeRule(
            f"{native_prefix}_attn.norm.query_norm.scale",
            (TensorSlice(f"{path}/attention/query_norm/scale"),),
        ),
        NativeRule(
            f"{native_prefix}_attn.norm.key_norm.scale",
            (TensorSlice(f"{path}/attention/key_norm/scale"),),
        ),
        *linear_rules(f"{native_prefix}_attn.proj", f"{path}/attention/proj", "heads"),
        *linear_rules(f"{native_prefix}_mlp.0", f"{path}/mlp/linear_in"),
        *linear_rules(f"{native_prefix}_mlp.2", f"{path}/mlp/linear_out"),
    ]


def embedder_rules(native_prefix: str, path: str) -> list[NativeRule]:
    return linear_rules(
        f"{native_prefix}.in_layer", f"modulation/condition/{path}/linear_in"
    ) + linear_rules(f"{native_prefix}.out_layer", f"modulation/condition/{path}/linear_out")


def has_modulation(modulation: str) -> Callable[[config.Model], bool]:
    return lambda model: model.modulation == modulation


def has_head(head: str) -> Callable[[config.Model], bool]:
    return lambda model: model.head == head


def offset_rules(modulation: str) -> list[NativeRule]:
    """Learned vectors, which only our own models have."""
    return [
        NativeRule(
            f"{native_prefix}.modulation_{name}",
            (TensorSlice(f"modulation/{path}"),),
            applies_to=has_modulation(modulation),
        )
        for native_prefix, name, path in (
            ("double_blocks.{i}", "img", "double_image"),
            ("double_blocks.{i}", "txt", "double_text"),
            ("single_blocks.{i}", "offset", "single"),
            ("final_layer", "offset", "output"),
        )
    ]


NATIVE_RULES: list[NativeRule] = [
    *linear_rules("img_in_patch", "patch_embed", "patch", applies_to=lambda model: model.patch > 1),
    *linear_rules("img_in", "patch_embed", applies_to=lambda model: model.patch == 1),
    NativeRule("img_in_bottleneck.in_layer.weight", (TensorSlice("patch_embed/linear_in/kernel", "patch"),)),
    *linear_rules("img_in_bottleneck.out_layer", "patch_embed/linear_out"),
    *linear_rules("txt_in", "text_embed"),
    NativeRule("txt_padding", (TensorSlice("padding"),)),
    NativeRule("registers", (TensorSlice("registers"),)),
    *linear_rules("distilled_guidance_layer.in_proj", "modulation/proj_in"),
    *linear_rules("distilled_guidance_layer.layers.{i}.in_layer", "modulation/layers/linear_in"),
    *linear_rules("distilled_guidance_layer.layers.{i}.out_layer", "modulation/layers/linear_out"),
    NativeRule("distilled_guidance_layer.norms.{i}.scale", (TensorSlice("modulation/layers/norm/scale"),)),
    *linear_rules("distilled_guidance_layer.out_proj", "modulation/proj_out"),
    *embedder_rules("time_in", "time"),
    *embedder_rules("guidance_in", "guidance"),
    *embedder_rules("vector_in", "pooled"),
    *linear_rules("double_blocks.{i}.img_mod.lin", "modulation/double_image", applies_to=has_modulation("per_block")),
    *linear_rules("double_blocks.{i}.txt_mod.lin", "modulation/double_text", applies_to=has_modulation("per_block")),
    *linear_rules("single_blocks.{i}.modulation.lin", "modulation/single", applies_to=has_modulation("per_block")),
    *linear_rules("final_layer.adaLN_modulation.1", "modulation/output", applies_to=has_modulation("per_block")),
    *linear_rules("shared_modulation.lin", "modulation/linear", applies_to=has_modulation("shared")),
    *offset_rules("shared"),
    *offset_rules("none"),
    *stream_rules("text_blocks.{i}.txt", "refiner"),
    *stream_rules("double_blocks.{i}.img", "double/image"),
    *stream_rules("double_blocks.{i}.txt", "double/text"),
    NativeRule("single_blocks.{i}.linear1.weight", (TensorSlice("single/attention/qkv/kernel", "matrix"), TensorSlice("single/mlp/linear_in/kernel", "matrix"))),
    NativeRule("single_blocks.{i}.linear1.bias", (TensorSlice("single/attention/qkv/bias", "flat"), TensorSlice("single/mlp/linear_in/bias"))),
    NativeRule("single_blocks.{i}.linear2.weight", (TensorSlice("single/attention/proj/kernel", "heads"), TensorSlice("single/mlp/linear_out/kernel", "matrix")), axis=1),
    NativeRule("single_blocks.{i}.linear2.bias", (TensorSlice("single/mlp/linear_out/bias"),)),
    NativeRule("single_blocks.{i}.norm.query_norm.scale", (TensorSlice("single/attention/query_norm/scale"),)),
    NativeRule("single_blocks.{i}.norm.key_norm.scale", (TensorSlice("single/attention/key_norm/scale"),)),
    *linear_rules("nerf_image_embedder.embedder.0", "head/embedder"),
    *linear_rules("nerf_blocks.{i}.param_generator", "head/blocks/param_generator"),
    NativeRule("nerf_blocks.{i}.norm.scale", (TensorSlice("head/blocks/norm/scale"),)),
    NativeRule("nerf_final_layer_conv.norm.scale", (TensorSlice("head/norm/scale"),), applies_to=has_head("nerf_conv")),
    *linear_rules("nerf_final_layer_conv.conv", "head/conv", "conv"),
    NativeRule("nerf_final_layer.norm.scale", (TensorSlice("head/norm/scale"),), applies_to=has_head("nerf_linear")),
    *linear_rules("nerf_final_layer.linear", "head/linear", applies_to=has_head("nerf_linear")),
    *linear_rules("final_layer.linear", "head/linear", applies_to=has_head("linear")),
]  # fmt: skip


# --- the table, for one model -----------------------------------------------------------------------------------------


class NativeSource(NamedTuple):
    """Where a native tensor's values lie in our tree."""

    rule: NativeRule
    block_index: int | None  # of the block; None for a tensor that stands alone


def native_layout(
    model: config.Model,
) -> tuple[dict[str, tuple[int, ...]], dict[str, NativeSource]]:
    """Shapes and sources of all native tensors of `model`, in the published order of names; markers have no source."""
    leaves = flatten_tree(make_abstract_params(model))
    shapes: dict[str, tuple[int, ...]] = {name: (0,) for name in model_markers(model)}
    sources: dict[str, NativeSource] = {}
    covered_paths: set[str] = set()
    for rule in NATIVE_RULES:
        paths = [tensor_slice.path for tensor_slice in rule.slices]
        if not rule.applies_to(model) or any(path not in leaves for path in paths):
            continue
        covered_paths.update(paths)
        is_stacked = "{i}" in rule.native_name
        join_leaves = partial(_join_leaves, rule, 0 if is_stacked else None, model=model)
        shape = jax.eval_shape(join_leaves, {path: leaves[path] for path in paths}).shape
        for i in range(leaves[paths[0]].shape[0]) if is_stacked else [None]:
            name = rule.native_name.format(i=i)
            shapes[name], sources[name] = shape, NativeSource(rule, i)
    if missing_paths := set(leaves) - covered_paths:
        raise AssertionError(f"The table has no row for {sorted(missing_paths)}.")
    return shapes, sources


def _join_leaves(
    rule: NativeRule, block_index: int | None, leaves: Mapping, *, model: config.Model
):
    """The native tensor from our leaves; works on NumPy and (abstract) JAX arrays."""
    arrays = []
    for path, leaf_layout in rule.slices:
        x = leaves[path] if block_index is None else leaves[path][block_index]
        arrays.append(
            LAYOUT_TO_NATIVE[leaf_layout](x, _patch_kernel_size(model))
            if leaf_layout == "patch"
            else LAYOUT_TO_NATIVE[leaf_layout](x)
        )
    if len(arrays) == 1:
        return arrays[0]
    return (np if isinstance(arrays[0], np.ndarray) else jax.numpy).concatenate(
        arrays, axis=rule.axis
    )


def _patch_kernel_size(model: config.Model) -> int:
    return model.patch // 2 if model.patch_embed == "conv_half" else model.patch


# --- there and back ---------------------------------------------------------------------------------------------------


def params_from_native(
    model: config.Model,
    shapes: TensorShapes,
    get_tensor: TensorGetter,
    origin: object,
    make_leaf: LeafMaker | None = None,
) -> Params:
    """Our tree from native tensors; `tensor(name)` reads one.

    store: makes a leaf from its path, its shape and its blocks (see `float32_leaf`, which is used when None); those of Packed
    tensors are Packed, and still [out, in]. Raises CheckpointError that names every tensor that is missing, not expected, or of
    another shape.
    """
    expected_shapes, sources = native_layout(model)
    check_shapes(expected_shapes, shapes, origin)
    abstract_params = make_abstract_params(model)
    leaves = flatten_tree(abstract_params)
    sources_by_path: dict[str, list[tuple[str, NativeSource]]] = {path: [] for path in leaves}
    for name, source in sources.items():
        for tensor_slice in source.rule.slices:
            sources_by_path[tensor_slice.path].append((name, source))

    def read_blocks(path: str) -> Iterator[np.ndarray | QuantizedTensor]:
        for name, (rule, block_index) in sources_by_path[path]:
            values = get_tensor(name)
            is_quantized = isinstance(values, QuantizedTensor)
            if not (values.is_finite() if is_quantized else is_finite(values)):
                raise CheckpointError(
                    f"{origin}: {name} holds values that are not finite: the file is damaged."
                )
            shape = leaves[path].shape if block_index is None else leaves[path].shape[1:]
            tensor_slice = _slice_tensor(rule, path, values, expected_shapes[name], leaves)
            yield (
                tensor_slice
                if is_quantized
                else LAYOUT_TO_LEAF[dict(rule.slices)[path]](tensor_slice).reshape(shape)
            )

    make_leaf = make_leaf or make_float32_leaf
    values = [make_leaf(path, leaves[path].shape, read_blocks(path)) for path in leaves]
    return jax.tree_util.tree_unflatten(jax.tree.structure(abstract_params), values)


def make_float32_leaf(path: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> jax.Array:
    """The blocks one behind the other (or the one that is the leaf) on the first device."""
    return jax.numpy.asarray(stack_blocks(shape, blocks, np.dtype(np.float32)))


def stack_blocks(
    shape: tuple[int, ...], blocks: Iterator[np.ndarray], dtype: np.dtype
) -> np.ndarray:
    result = np.empty(shape, dtype)
    for i, block in enumerate(blocks):
        result[i if block.ndim < result.ndim else ...] = block
    return result


def _slice_tensor(
    rule: NativeRule,
    path: str,
    tensor: np.ndarray | QuantizedTensor,
    shape: tuple[int, ...],
    leaves: Mapping,
) -> np.ndarray | QuantizedTensor:
    """The part of a native tensor that belongs to `path`."""
    sizes = [
        math.prod(leaves[p].shape[1:] if "{i}" in rule.native_name else leaves[p].shape)
        * shape[rule.axis]
        // math.prod(shape)
        for p, _ in rule.slices
    ]
    position = [p for p, _ in rule.slices].index(path)
    begin, end = sum(sizes[:position]), sum(sizes[: position + 1])
    if len(rule.slices) == 1:
        return tensor
    if isinstance(tensor, QuantizedTensor):
        return tensor.slice_axis(rule.axis, begin, end)
    return tensor[(slice(None),) * rule.axis + (slice(begin, end),)]


def params_to_native(
    model: config.Model, params: Params
) -> tuple[TensorShapes, Callable[[str], np.ndarray]]:
    """Shapes of the native tensors of `params`, markers first, and what makes one of them."""
    shapes, sources = native_layout(model)
    leaves = flatten_tree(params)

    def get_tensor(name: str) -> np.ndarray:
        if name not in sources:
            return np.zeros(0, np.float32)
        rule, block_index = sources[name]
        slice_leaves = {
            p: np.asarray(leaves[p] if block_index is None else leaves[p][block_index])
            for p, _ in rule.slices
        }
        return _join_leaves(rule, None, slice_leaves, model=model)

    return shapes, get_tensor
