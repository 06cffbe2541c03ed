"""The native format: tensor names and layouts of the published checkpoints, and our tree.

One table is used in both directions. Most native tensors are one leaf; the fused matrices of the
single blocks consist of two. Blocks are stacked along axis 0 of our leaves.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.trees import flatten_tree
from radiance.model.paths import is_always_float32, is_block_matrix
from radiance.model.transformer import Params, make_abstract_params
from radiance.weights.detect import MARKERS, check_shapes, model_markers
from radiance.weights.heads import head_rules
from radiance.weights.native_rules import (
    LAYOUT_TO_LEAF,
    LAYOUT_TO_NATIVE,
    ModelPredicate,
    NativeRule,
    TensorSlice,
    leaf_rule,
    linear_rules,
)
from radiance.weights.tensors import QuantizedTensor, TensorShapes, is_finite

TensorGetter = Callable[[str], np.ndarray | QuantizedTensor]
LeafMaker = Callable[[str, tuple[int, ...], Iterator[np.ndarray | QuantizedTensor]], Any]


def stream_rules(native_prefix: str, path: str) -> list[NativeRule]:
    """Return the rules of one stream of the double blocks, or of the text refiner blocks."""
    return [
        *linear_rules(f"{native_prefix}_attn.qkv", f"{path}/attention/qkv"),
        leaf_rule(
            f"{native_prefix}_attn.norm.query_norm.scale", f"{path}/attention/query_norm/scale"
        ),
        leaf_rule(f"{native_prefix}_attn.norm.key_norm.scale", f"{path}/attention/key_norm/scale"),
        *linear_rules(f"{native_prefix}_attn.proj", f"{path}/attention/proj", "heads"),
        *linear_rules(f"{native_prefix}_mlp.0", f"{path}/mlp/linear_in"),
        *linear_rules(f"{native_prefix}_mlp.2", f"{path}/mlp/linear_out"),
    ]


def embedder_rules(native_prefix: str, path: str) -> list[NativeRule]:
    """Return the rules of one of FLUX's embedders of the condition."""
    path = f"modulation/condition/{path}"
    return [
        *linear_rules(f"{native_prefix}.in_layer", f"{path}/linear_in"),
        *linear_rules(f"{native_prefix}.out_layer", f"{path}/linear_out"),
    ]


def has_modulation(modulation: str) -> ModelPredicate:
    """Return the predicate of models with a kind of modulation."""
    return lambda model: model.modulation == modulation


def per_block_rules(native_prefix: str, path: str) -> list[NativeRule]:
    """Return the rules of one of FLUX's modulation layers."""
    return linear_rules(native_prefix, f"modulation/{path}", applies_to=has_modulation("per_block"))


def offset_rules(modulation: str) -> list[NativeRule]:
    """Return the rules of learned modulation vectors, which only our own models have."""
    return [
        leaf_rule(
            f"{native_prefix}.modulation_{name}",
            f"modulation/{path}",
            applies_to=has_modulation(modulation),
        )
        for native_prefix, name, path in (
            ("double_blocks.{i}", "img", "double_image"),
            ("double_blocks.{i}", "txt", "double_text"),
            ("single_blocks.{i}", "offset", "single"),
            ("final_layer", "offset", "output"),
        )
    ]


def fused_rule(native_name: str, *slices: tuple[str, str], axis: int = 0) -> NativeRule:
    """Return the rule of a native tensor that consists of several (path, layout) slices."""
    return NativeRule(native_name, tuple(TensorSlice(*x) for x in slices), axis)


# In the published order of names.
NATIVE_RULES: list[NativeRule] = [
    # Input: latents or patches of pixels, text, and extra tokens.
    *linear_rules("img_in_patch", "patch_embed", "patch", applies_to=lambda model: model.patch > 1),
    *linear_rules("img_in", "patch_embed", applies_to=lambda model: model.patch == 1),
    leaf_rule("img_in_bottleneck.in_layer.weight", "patch_embed/linear_in/kernel", "patch"),
    *linear_rules("img_in_bottleneck.out_layer", "patch_embed/linear_out"),
    *linear_rules("txt_in", "text_embed"),
    leaf_rule("txt_padding", "padding"),
    leaf_rule("registers", "registers"),
    # Modulation: Chroma's approximator, FLUX's layers, or our own variants.
    *linear_rules("distilled_guidance_layer.in_proj", "modulation/proj_in"),
    *linear_rules("distilled_guidance_layer.layers.{i}.in_layer", "modulation/layers/linear_in"),
    *linear_rules("distilled_guidance_layer.layers.{i}.out_layer", "modulation/layers/linear_out"),
    leaf_rule("distilled_guidance_layer.norms.{i}.scale", "modulation/layers/norm/scale"),
    *linear_rules("distilled_guidance_layer.out_proj", "modulation/proj_out"),
    *embedder_rules("time_in", "time"),
    *embedder_rules("guidance_in", "guidance"),
    *embedder_rules("vector_in", "pooled"),
    *per_block_rules("double_blocks.{i}.img_mod.lin", "double_image"),
    *per_block_rules("double_blocks.{i}.txt_mod.lin", "double_text"),
    *per_block_rules("single_blocks.{i}.modulation.lin", "single"),
    *per_block_rules("final_layer.adaLN_modulation.1", "output"),
    *linear_rules(
        "shared_modulation.lin", "modulation/linear", applies_to=has_modulation("shared")
    ),
    *offset_rules("shared"),
    *offset_rules("none"),
    # Blocks.
    *stream_rules("text_blocks.{i}.txt", "refiner"),
    *stream_rules("double_blocks.{i}.img", "double/image"),
    *stream_rules("double_blocks.{i}.txt", "double/text"),
    fused_rule(
        "single_blocks.{i}.linear1.weight",
        ("single/attention/qkv/kernel", "matrix"),
        ("single/mlp/linear_in/kernel", "matrix"),
    ),
    fused_rule(
        "single_blocks.{i}.linear1.bias",
        ("single/attention/qkv/bias", "flat"),
        ("single/mlp/linear_in/bias", "same"),
    ),
    fused_rule(
        "single_blocks.{i}.linear2.weight",
        ("single/attention/proj/kernel", "heads"),
        ("single/mlp/linear_out/kernel", "matrix"),
        axis=1,
    ),
    leaf_rule("single_blocks.{i}.linear2.bias", "single/mlp/linear_out/bias"),
    leaf_rule("single_blocks.{i}.norm.query_norm.scale", "single/attention/query_norm/scale"),
    leaf_rule("single_blocks.{i}.norm.key_norm.scale", "single/attention/key_norm/scale"),
    # Head.
    *head_rules(),
]
_RULES_BY_NAME = {native_rule.native_name: native_rule for native_rule in NATIVE_RULES}


def _find_paths(name: str) -> list[str]:
    """Return the paths of the leaves that a native tensor consists of."""
    pattern = re.sub(r"\.\d+\.", ".{i}.", name, count=1)
    native_rule = _RULES_BY_NAME.get(name) or _RULES_BY_NAME.get(pattern)
    return [tensor_slice.path for tensor_slice in native_rule.slices] if native_rule else []


def is_quantizable(name: str) -> bool:
    """Return True for the native tensors that may be quantized: the matrices of the blocks.

    All others are few of the weights, but rounding them does most of the damage.
    """
    paths = _find_paths(name)
    return bool(paths) and all(map(is_block_matrix, paths))


def is_float32_tensor(name: str) -> bool:
    """Return True for native tensors that are float32 in every file, as in the published ones."""
    paths = _find_paths(name)
    return name in MARKERS or (bool(paths) and all(map(is_always_float32, paths)))


# --- the native tensors of one model --------------------------------------------------------------


class NativeSource(NamedTuple):
    """The values of a native tensor in our tree."""

    rule: NativeRule
    block_index: int | None  # None for tensors outside the blocks


def native_layout(
    model: config.Model,
) -> tuple[dict[str, tuple[int, ...]], dict[str, NativeSource]]:
    """Return shapes and sources of all native tensors of a model, in the published order.

    Markers come first; they have shapes but no sources.
    """
    leaves = flatten_tree(make_abstract_params(model))
    shapes: dict[str, tuple[int, ...]] = {name: (0,) for name in model_markers(model)}
    sources: dict[str, NativeSource] = {}
    covered_paths: set[str] = set()
    for native_rule in NATIVE_RULES:
        paths = [tensor_slice.path for tensor_slice in native_rule.slices]
        if not native_rule.applies_to(model) or any(path not in leaves for path in paths):
            continue
        covered_paths.update(paths)
        is_stacked = "{i}" in native_rule.native_name
        join_leaves = partial(_join_leaves, native_rule, 0 if is_stacked else None, model=model)
        shape = jax.eval_shape(join_leaves, {path: leaves[path] for path in paths}).shape
        for i in range(leaves[paths[0]].shape[0]) if is_stacked else [None]:
            name = native_rule.native_name.format(i=i)
            shapes[name], sources[name] = shape, NativeSource(native_rule, i)
    if missing_paths := set(leaves) - covered_paths:
        raise AssertionError(f"The table has no rule for {sorted(missing_paths)}.")
    return shapes, sources


def _join_leaves(
    native_rule: NativeRule, block_index: int | None, leaves: Mapping, *, model: config.Model
):
    """Return a native tensor made of NumPy or (abstract) JAX leaves."""
    arrays = []
    for path, layout in native_rule.slices:
        x = leaves[path] if block_index is None else leaves[path][block_index]
        layout_args = (_patch_kernel_size(model),) if layout == "patch" else ()
        arrays.append(LAYOUT_TO_NATIVE[layout](x, *layout_args))
    if len(arrays) == 1:
        return arrays[0]
    concatenate = np.concatenate if isinstance(arrays[0], np.ndarray) else jax.numpy.concatenate
    return concatenate(arrays, axis=native_rule.axis)


def _patch_kernel_size(model: config.Model) -> int:
    """Return the side of the patch embedding's kernel in pixels."""
    return model.patch // 2 if model.patch_embed == "conv_half" else model.patch


# --- from and to our tree -------------------------------------------------------------------------


def params_from_native(
    model: config.Model,
    shapes: TensorShapes,
    get_tensor: TensorGetter,
    origin: object,
    make_leaf: LeafMaker | None = None,
) -> Params:
    """Return our parameter tree, made leaf by leaf of native tensors.

    Args:
        model: The model.
        shapes: Shapes of the native tensors; markers are optional.
        get_tensor: Returns a native tensor.
        origin: The file or run that errors name.
        make_leaf: Makes a leaf from its path, its shape and an iterator of its blocks; by default
            `make_float32_leaf`. Blocks of quantized tensors are quantized, and still [out, in].

    Raises:
        CheckpointError: If tensors are missing, unexpected or of another shape, all of which are
            named, or if values are not finite.
    """
    expected_shapes, sources = native_layout(model)
    check_shapes(expected_shapes, shapes, origin)
    abstract_params = make_abstract_params(model)
    leaves = flatten_tree(abstract_params)
    leaf_sources = _find_leaf_sources(leaves, expected_shapes, sources)

    def read_blocks(path: str) -> Iterator[np.ndarray | QuantizedTensor]:
        if path not in leaf_sources:  # the model has none of these blocks
            return
        source = leaf_sources[path]
        shape = leaves[path].shape[1:] if source.is_stacked else leaves[path].shape
        for name in source.names:
            tensor = get_tensor(name)
            if not _has_finite_values(tensor):
                raise CheckpointError(
                    f"{origin}: {name} holds values that are not finite: the file is damaged."
                )
            block = source.slice_tensor(tensor)
            if not isinstance(block, QuantizedTensor):
                block = LAYOUT_TO_LEAF[source.layout](block).reshape(shape)
            yield block

    make = make_leaf or make_float32_leaf
    values = [make(path, leaves[path].shape, read_blocks(path)) for path in leaves]
    return jax.tree_util.tree_unflatten(jax.tree.structure(abstract_params), values)


def _has_finite_values(tensor: np.ndarray | QuantizedTensor) -> bool:
    return tensor.is_finite() if isinstance(tensor, QuantizedTensor) else is_finite(tensor)


class _LeafSource(NamedTuple):
    """The values of a leaf in the native tensors: a range of one of their axes."""

    names: list[str]  # of the native tensors, one per block
    is_stacked: bool
    layout: str
    axis: int
    begin: int
    end: int
    is_complete: bool  # the range is the complete tensor

    def slice_tensor(self, tensor: np.ndarray | QuantizedTensor) -> np.ndarray | QuantizedTensor:
        """Return the part of a native tensor that belongs to the leaf."""
        if self.is_complete:
            return tensor
        if isinstance(tensor, QuantizedTensor):
            return tensor.slice_axis(self.axis, self.begin, self.end)
        return tensor[(slice(None),) * self.axis + (slice(self.begin, self.end),)]


def _find_leaf_sources(
    leaves: Mapping[str, Any], shapes: TensorShapes, sources: Mapping[str, NativeSource]
) -> dict[str, _LeafSource]:
    """Return the source of every leaf; bounds are computed once for each rule."""
    names_by_rule: dict[NativeRule, list[str]] = {}
    for name, source in sources.items():
        names_by_rule.setdefault(source.rule, []).append(name)
    leaf_sources = {}
    for native_rule, names in names_by_rule.items():
        is_stacked = "{i}" in native_rule.native_name
        shape = shapes[names[0]]
        begin = 0
        for path, layout in native_rule.slices:
            leaf_shape = leaves[path].shape[1:] if is_stacked else leaves[path].shape
            end = begin + math.prod(leaf_shape) * shape[native_rule.axis] // math.prod(shape)
            is_complete = len(native_rule.slices) == 1
            leaf_sources[path] = _LeafSource(
                names, is_stacked, layout, native_rule.axis, begin, end, is_complete
            )
            begin = end
    return leaf_sources


def make_float32_leaf(path: str, shape: tuple[int, ...], blocks: Iterator[Any]) -> jax.Array:
    """Return a leaf in float32 on the first device.

    Args:
        path: Path of the leaf, which is not used.
        shape: Shape of the leaf.
        blocks: Its blocks in order, or the one array that the leaf consists of.
    """
    return jax.numpy.asarray(stack_blocks(shape, blocks, np.dtype(np.float32)))


def stack_blocks(shape: tuple[int, ...], blocks: Iterator[Any], dtype: np.dtype) -> np.ndarray:
    """Return blocks stacked along axis 0, or the one block that already has the shape.

    Args:
        shape: Shape of the result.
        blocks: Arrays, each read when it is needed.
        dtype: Type of the result.
    """
    result = np.empty(shape, dtype)
    for i, block in enumerate(blocks):
        result[i if block.ndim < result.ndim else ...] = block
    return result


def params_to_native(
    model: config.Model, params: Params
) -> tuple[TensorShapes, Callable[[str], np.ndarray]]:
    """Return the shapes of the native tensors of parameters, and a function that makes one.

    Args:
        model: The model.
        params: Its parameter tree.

    Returns:
        Shapes by native name, markers first, and a function from native name to values.
    """
    shapes, sources = native_layout(model)
    leaves = flatten_tree(params)

    def get_tensor(name: str) -> np.ndarray:
        if name not in sources:  # a marker
            return np.zeros(0, np.float32)
        native_rule, block_index = sources[name]
        blocks = {
            path: np.asarray(leaves[path] if block_index is None else leaves[path][block_index])
            for path, _ in native_rule.slices
        }
        return _join_leaves(native_rule, None, blocks, model=model)

    return shapes, get_tensor
