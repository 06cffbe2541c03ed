"""Stochastic rounding to bfloat16."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray, PyTree, UInt32

from radiance.model.transformer import Params


def stochastic_round(key: PRNGKeyArray, tree: PyTree, like: PyTree) -> PyTree:
    """Round a float32 tree to the types of another tree.

    Args:
        key: Random key.
        tree: Float32 arrays.
        like: A tree with the same structure, whose leaves have type float32 or bfloat16.

    Returns:
        The tree in the types of `like`; a bfloat16 value is one of the two neighbors of the
        original value, with probabilities such that its mean is that value.
    """
    leaves, treedef = jax.tree.flatten(tree)
    leaf_triples = zip(jax.random.split(key, len(leaves)), leaves, jax.tree.leaves(like))
    return jax.tree.unflatten(
        treedef,
        [
            _round_to_bfloat16(k, x) if like_leaf.dtype == jnp.bfloat16 else x
            for k, x, like_leaf in leaf_triples
        ],
    )


def _round_to_bfloat16(key: PRNGKeyArray, x: Float32[Array, "..."]) -> BFloat16[Array, "..."]:
    """Add random bits to the lower half of float32, which carry into the upper half, bfloat16."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded_bits = (bits + (hash_indexes(key, x.shape) >> 16)) & jnp.uint32(0xFFFF0000)
    return jnp.where(
        jnp.isfinite(x), jax.lax.bitcast_convert_type(rounded_bits, jnp.float32), x
    ).astype(jnp.bfloat16)


def hash_indexes(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Compute random bits for rounding: a hash of each element's index with two random numbers.

    `jax.random.bits` takes about 110 operations for each element, which is longer than an
    accelerator needs to read and write a weight and its moments. Rounding needs no more than bits
    without bias that differ between elements, arrays and steps.

    Args:
        key: Random key.
        shape: Shape of the array.

    Returns:
        Bits, of which the upper ones are best.
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        position = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += position * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    # Two rounds of odd multipliers, whose carries go up, and shifts, which bring high bits down.
    bits = (index ^ first) * jnp.uint32(0x9E3779B1)
    bits = ((bits ^ (bits >> 15)) + second) * jnp.uint32(0x85EBCA77)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE3D)
    return bits ^ (bits >> 16)


def cast_params(params: Params, dtype: str) -> Params:
    """Cast parameters to the types in which they are stored.

    Args:
        params: The parameter tree.
        dtype: Type of the matrices, except the pixel embedder's.

    Returns:
        The tree; vectors and the pixel embedder are float32, as in the published files.
    """

    def cast_leaf(path, p):
        is_float32 = path[-1].key != "kernel" or [k.key for k in path[:2]] == ["head", "embedder"]
        return p.astype(jnp.float32 if is_float32 else dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, params)
