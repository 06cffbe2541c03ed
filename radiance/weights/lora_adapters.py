"""Apply LoRAs to a parameter tree without merging them, and collect trained adapters from one."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from scipy.linalg import block_diag

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.trees import flatten_tree, leaf_path
from radiance.model.lora import LoraKernel
from radiance.model.paths import count_inputs, is_block_matrix
from radiance.model.transformer import Params, make_abstract_params
from radiance.weights import native
from radiance.weights.lora import LoraWeights, check_lora_fits
from radiance.weights.lora_changes import LoraPair


class LoraTarget(NamedTuple):
    """The change up · down of one native tensor, which is one block of a leaf or all of it."""

    source: native.NativeSource
    native_shape: tuple[int, ...]
    down: Float32[np.ndarray, "rank in"]
    up: Float32[np.ndarray, "out rank"]  # times strength and scale


def can_stay_unmerged(lora: LoraWeights) -> bool:
    """Return True if a LoRA is smaller beside the weights than the weights themselves.

    That is so if all its changes are pairs of low rank. The pairs of stacked blocks are padded to
    the highest rank, so one rank in a file must not determine the memory of all blocks.

    Args:
        lora: The LoRA.
    """
    sources = native.native_layout(lora.model)[1]
    return not lora.changes and all(
        2 * len(pair.down) <= min(len(pair.up), pair.down.shape[1])
        for module, pair in lora.pairs.items()
        if is_block_matrix(sources[f"{module}.weight"].rule.slices[0].path)
    )


def apply_loras(
    params: Params, model: config.Model, loras: Iterable[tuple[LoraWeights, float]]
) -> Params:
    """Return `params` with LoRAs of given strengths, for sampling.

    The matrices of the blocks, which may be quantized, stay as they are in memory and become
    `LoraKernel`s. The few matrices outside the blocks are changed. To change strengths, call this
    function again with the original `params`.

    Args:
        params: The parameter tree of `model`, without LoRAs.
        model: The model.
        loras: All LoRAs to apply, each with its strength.

    Returns:
        The new parameter tree.

    Raises:
        CheckpointError: A LoRA does not fit the model, or has changes other than pairs of matrices.
        ValueError: `params` have LoRAs already.
    """
    # Collect the pairs of all LoRAs by native tensor, because a kernel takes one pair.
    scaled_pairs: dict[str, list[tuple[LoraPair, float]]] = {}
    for lora, strength in loras:
        check_lora_fits(lora, model)
        if lora.changes:
            raise CheckpointError(
                f"{lora.origin} changes {next(iter(lora.changes))} by more than a pair of "
                "matrices: merge it into the checkpoint (`merge_lora`)."
            )
        for module, pair in lora.pairs.items():
            scaled_pairs.setdefault(f"{module}.weight", []).append((pair, strength))

    # Find the leaves that hold these tensors.
    shapes, sources = native.native_layout(model)
    targets: dict[str, list[LoraTarget]] = {}
    for name, pairs in scaled_pairs.items():
        down = np.concatenate([pair.down for pair, _ in pairs])
        ups = [np.float32(strength * pair.scale) * pair.up for pair, strength in pairs]
        target = LoraTarget(sources[name], shapes[name], down, np.concatenate(ups, axis=1))
        for tensor_slice in sources[name].rule.slices:
            targets.setdefault(tensor_slice.path, []).append(target)

    def adapt_leaf(key_path: tuple, expected_leaf: jax.ShapeDtypeStruct, value: Any) -> Any:
        path = leaf_path(key_path)
        if path not in targets:
            return value
        if isinstance(value, LoraKernel):
            raise ValueError(
                "These parameters have LoRAs already: apply all LoRAs at once, to the parameters "
                "without LoRAs."
            )
        adapt = _adapt_blocks if is_block_matrix(path) else _add_delta
        return adapt(value, path, expected_leaf.shape, targets[path])

    return jax.tree_util.tree_map_with_path(adapt_leaf, make_abstract_params(model), params)


def _adapt_blocks(
    base: Any, path: str, shape: tuple[int, ...], targets: Sequence[LoraTarget]
) -> Any:
    """Return a leaf of block matrices with its pairs; missing blocks and ranks are zeros."""
    num_blocks, *matrix_shape = shape
    num_inputs = count_inputs(path, shape)
    num_outputs = math.prod(matrix_shape) // num_inputs
    rank = max(len(target.down) for target in targets)
    downs = np.zeros((num_blocks, num_inputs, rank), np.float32)
    ups = np.zeros((num_blocks, rank, num_outputs), np.float32)
    for (rule, index), _, down, up in targets:
        # A fused matrix has two slices: one is its beginning, the other its end.
        size = num_inputs if rule.axis else num_outputs
        leaf_slice = slice(size) if rule.slices[0].path == path else slice(-size, None)
        downs[index, :, : len(down)] = (down[:, leaf_slice] if rule.axis else down).T
        ups[index, : len(down)] = (up if rule.axis else up[leaf_slice]).T
    if not ups.any():  # the LoRA changes only the other slice of a fused matrix
        return base
    return LoraKernel(base, jnp.asarray(downs), jnp.asarray(ups))


def _add_delta(
    value: jax.Array, path: str, shape: tuple[int, ...], targets: Sequence[LoraTarget]
) -> jax.Array:
    """Return a leaf outside the blocks with the changes added to it."""
    delta = np.zeros(shape, np.float32)
    for (rule, index), native_shape, down, up in targets:
        to_leaf = native.LAYOUT_TO_LEAF[rule.slices[0].layout]
        block_index = ... if index is None else index
        delta[block_index] = to_leaf((up @ down).reshape(native_shape)).reshape(
            delta[block_index].shape
        )
    return (value.astype(jnp.float32) + delta).astype(value.dtype)


def adapters_to_lora(
    model: config.Model, adapters: Params, scale: float, origin: str
) -> LoraWeights:
    """Return a trained LoRA as pairs for native modules.

    A native matrix that is fused from two leaves gets one pair, whose rank is the sum of the two.

    Args:
        model: The model that the LoRA was trained for.
        adapters: A part of the parameter tree, in which each adapted kernel is a dictionary
            {"down": [blocks, in, rank], "up": [blocks, rank, out]}.
        scale: alpha / rank.
        origin: Name of the LoRA in messages.

    Returns:
        The pairs in float32.
    """
    matrices: dict[str, dict[str, np.ndarray]] = {}
    for path, values in flatten_tree(adapters).items():
        matrix, _, factor_name = path.rpartition("/")
        matrices.setdefault(matrix, {})[factor_name] = np.asarray(values, np.float32)
    leaves = flatten_tree(make_abstract_params(model))

    def get_factors(path: str, block_index: int | None) -> tuple[np.ndarray, np.ndarray]:
        if path not in matrices:
            return _make_empty_pair(path, leaves[path].shape)
        return matrices[path]["down"][block_index].T, matrices[path]["up"][block_index].T

    pairs: dict[str, LoraPair] = {}
    for name, (rule, block_index) in native.native_layout(model)[1].items():
        paths = [tensor_slice.path for tensor_slice in rule.slices]
        if not rule.native_name.endswith(".weight") or not any(path in matrices for path in paths):
            continue
        downs, ups = zip(*(get_factors(path, block_index) for path in paths))
        if rule.axis == 0:  # the slices share their inputs
            down, up = np.concatenate(downs), block_diag(*ups)
        else:  # the slices share their outputs
            down, up = block_diag(*downs), np.concatenate(ups, axis=1)
        pairs[name.removesuffix(".weight")] = LoraPair(down, up, scale)
    return LoraWeights(model, pairs, origin)


def _make_empty_pair(path: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return a pair of rank 0, for a leaf without an adapter."""
    num_inputs = count_inputs(path, shape)
    num_outputs = math.prod(shape[1:]) // num_inputs
    return np.zeros((0, num_inputs), np.float32), np.zeros((num_outputs, 0), np.float32)
