"""Stochastic rounding to bfloat16."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, PRNGKeyArray

from radiance.model.transformer import Params


def stochastic_round(key: PRNGKeyArray, tree: Params, like: Params) -> Params:
    """A float32 tree in the types of `like`; bfloat16 is rounded at random to one of its two neighbors, so that its mean is the value."""
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
    """bfloat16 is the upper half of float32: what is added to the lower half carries over as often as it should."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded_bits = (bits + jax.random.bits(key, x.shape, jnp.uint16)) & jnp.uint32(0xFFFF0000)
    return jnp.where(
        jnp.isfinite(x), jax.lax.bitcast_convert_type(rounded_bits, jnp.float32), x
    ).astype(jnp.bfloat16)


def cast_params(params: Params, dtype: str) -> Params:
    """Parameters as they are kept: matrices in `dtype`, but for the pixel embedder's, which the published files have in float32 too."""

    def cast_leaf(path, p):
        is_float32 = path[-1].key != "kernel" or [k.key for k in path[:2]] == ["head", "embedder"]
        return p.astype(jnp.float32 if is_float32 else dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, params)
