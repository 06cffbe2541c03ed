"""The encoder of T5 v1.1 (arXiv 1910.10683, 2002.05202): token ids to vectors.

Axis letters: b batch, l tokens, d hidden, h heads, k head size, v vocabulary. The parameters are
kept outside the module, in a plain nested dict with the blocks stacked on axis 0, as those of
`model/transformer.py`. They are read, but never trained or written; sizes come from the file.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from radiance.base.settings import Section, require
from radiance.model.keys import make_rngs
from radiance.model.precision import exact_in_float32

Params = dict[str, Any]  # nested; leaves are arrays

MAX_DISTANCE = 128  # tokens; larger distances share a bucket. The same in every T5, in no file
FLOAT32 = jnp.dtype("float32")


@dataclass(frozen=True)
class T5(Section):
    """Sizes of the encoder; the defaults are those of T5 v1.1 XXL."""

    vocabulary: int = 32128
    hidden: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp_hidden: int = 10240
    buckets: int = 32  # of relative positions; half of them are for later tokens

    def check(self):
        """Raise ConfigError for sizes that are too small or do not divide."""
        for name in ("vocabulary", "hidden", "layers", "heads", "head_dim", "mlp_hidden"):
            require(
                getattr(self, name) >= 1,
                f"t5.{name} is {getattr(self, name)}: it must be at least 1.",
            )
        require(
            self.buckets >= 4 and self.buckets % 4 == 0,
            f"t5.buckets={self.buckets} must be a positive multiple of 4.",
        )


# --- the network ----------------------------------------------------------------------------------
# Matrix products are computed in `dtype` with float32 sums. The residual stream and its updates,
# the norms, the softmax and the position bias are float32. MLP outputs of the large T5s overflow
# float16, so it is not supported; bfloat16 holds them, but would round the stream to less than
# three digits twice per block.


class T5Attention(nnx.Module):
    """Self-attention behind an RMS norm, with a residual connection."""

    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = partial(nnx.LinearGeneral, use_bias=False, dtype=dtype, rngs=rngs)
        heads = (t5.heads, t5.head_dim)
        self.norm = nnx.RMSNorm(t5.hidden, epsilon=1e-6, dtype=FLOAT32, rngs=rngs)
        self.q, self.k, self.v = (linear(t5.hidden, heads) for _ in range(3))
        self.proj = linear(heads, t5.hidden, axis=(-2, -1), preferred_element_type=FLOAT32)

    def __call__(
        self, x: Float32[Array, "b l d"], bias: Float32[Array, "1 h l l"], lengths: Int[Array, " b"]
    ) -> Float32[Array, "b l d"]:
        """Update the tokens."""
        y = self.norm(x)
        # T5 does not scale the products of queries and keys; it scales their initialization.
        y = jax.nn.dot_product_attention(
            self.q(y), self.k(y), self.v(y), bias, scale=1.0, key_value_seq_lengths=lengths
        )
        return x + self.proj(y)


class T5MLP(nnx.Module):
    """Residual GEGLU (arXiv 2002.05202) with GELU's tanh form, behind an RMS norm."""

    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = nnx.RMSNorm(t5.hidden, epsilon=1e-6, dtype=FLOAT32, rngs=rngs)
        self.gate = linear(t5.hidden, t5.mlp_hidden)
        self.linear_in = linear(t5.hidden, t5.mlp_hidden)
        self.linear_out = linear(t5.mlp_hidden, t5.hidden, preferred_element_type=FLOAT32)

    def __call__(self, x: Float32[Array, "b l d"]) -> Float32[Array, "b l d"]:
        """Update the tokens."""
        y = self.norm(x)
        return x + self.linear_out(nnx.gelu(self.gate(y), approximate=True) * self.linear_in(y))


class T5Block(nnx.Module):
    """Attention, then MLP."""

    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = T5Attention(t5, dtype, rngs)
        self.mlp = T5MLP(t5, dtype, rngs)

    def __call__(
        self, x: Float32[Array, "b l d"], bias: Float32[Array, "1 h l l"], lengths: Int[Array, " b"]
    ) -> Float32[Array, "b l d"]:
        """Update the tokens."""
        return self.mlp(self.attention(x, bias, lengths))


class T5Network(nnx.Module):
    """The encoder's network."""

    def __init__(self, t5: T5, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = nnx.Param(jnp.zeros((t5.vocabulary, t5.hidden)))
        self.position_bias = nnx.Param(jnp.zeros((t5.buckets, t5.heads)))
        self.blocks = jax.vmap(lambda key: T5Block(t5, dtype, make_rngs(key)))(
            jax.random.split(rngs.params(), t5.layers)
        )
        self.norm = nnx.RMSNorm(t5.hidden, epsilon=1e-6, dtype=FLOAT32, rngs=rngs)

    @exact_in_float32
    def __call__(
        self, ids: Int[Array, "b l"], lengths: Int[Array, " b"]
    ) -> Float32[Array, "b l d"]:
        """Compute the vectors of all tokens.

        Every token, padding included, attends to the first `lengths` tokens of its text. So a row
        of padding depends on the real tokens and on its position, but not on the amount of padding.

        Args:
            ids: Token ids.
            lengths: Number of real tokens, at least 1.

        Returns:
            Vectors of real tokens and of padding.
        """
        x = self.embedding[...][ids].astype(FLOAT32)
        bias_buckets = position_buckets(ids.shape[1], self.position_bias.shape[0])
        bias = jnp.moveaxis(self.position_bias[...][bias_buckets].astype(FLOAT32), -1, 0)[None]
        x, _ = jax.lax.scan(lambda x, block: (block(x, bias, lengths), None), x, self.blocks)
        return self.norm(x)


def position_buckets(length: int, num_buckets: int) -> Int[np.ndarray, "l l"]:
    """Compute the bucket of the position bias for each query (row) and key (column).

    In each half of the buckets the first half hold single distances; the widths of the others grow
    by equal factors up to MAX_DISTANCE.

    Args:
        length: Number of tokens.
        num_buckets: Number of buckets.

    Returns:
        Indexes of buckets.
    """
    num_half = num_buckets // 2
    num_near = num_half // 2
    # First distance of each of the wider buckets
    exponents = np.arange(num_half - num_near) / (num_half - num_near)
    far_edges = num_near * (MAX_DISTANCE / num_near) ** exponents
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    far_buckets = num_near - 1 + np.searchsorted(far_edges, np.abs(distance), side="right")
    return np.where(distance > 0, num_half, 0) + np.where(
        np.abs(distance) < num_near, np.abs(distance), far_buckets
    )


# --- parameters as a plain tree -------------------------------------------------------------------


@lru_cache(maxsize=64)
def _split_abstract_network(t5: T5, dtype: str):
    """Split a network without arrays into its graph and its parameters' shapes."""
    return nnx.split(
        jax.eval_shape(
            lambda key: T5Network(t5, jnp.dtype(dtype), make_rngs(key)), jax.random.key(0)
        )
    )


def make_abstract_t5(t5: T5, dtype: str = "float32") -> Params:
    """Make the parameter tree with shapes and types in place of arrays.

    Args:
        t5: Sizes of the network.
        dtype: Type of the matrices; norms and the position bias are always float32.

    Returns:
        The tree of `jax.ShapeDtypeStruct`.
    """

    def make_leaf(path, leaf):
        is_matrix = path[-1].key in ("kernel", "embedding")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if is_matrix else FLOAT32)

    return jax.tree_util.tree_map_with_path(
        make_leaf, nnx.to_pure_dict(_split_abstract_network(t5, "float32")[1])
    )


def bind_t5(t5: T5, dtype: str, params: Params) -> T5Network:
    """Bind parameters to a module that computes in `dtype`; inside `jax.jit` this costs nothing."""
    return nnx.merge(_split_abstract_network(t5, dtype)[0], params)


@partial(jax.jit, static_argnames=("t5", "dtype"))
def encode_ids(
    t5: T5,
    dtype: str,
    params: Params,
    ids: Int[Array | np.ndarray, "b l"],
    lengths: Int[Array | np.ndarray, " b"],
) -> Float[Array, "b l d"]:
    """Compute the vectors of texts, of tokens and of padding, in `dtype`."""
    return bind_t5(t5, dtype, params)(ids, lengths).astype(dtype)
