"""Transformer blocks: double (image and text with separate weights), single (one stream), text.

Single blocks keep the parts of the checkpoints' fused matrices (`linear1`, `linear2`) separate, so
that heads and MLP channels can each be sharded; `weights/` joins and splits them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from radiance import config
from radiance.model.float8 import multiply_in_float8
from radiance.model.rope import apply_rope

PRODUCTS = {"compute": jax.lax.dot_general, "float8": multiply_in_float8}

# Queries, keys and values [b, n, h, k] to the attention's output [b, n, h, k].
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def layer_norm(x: Float[Array, "b n d"]) -> Float32[Array, "b n d"]:
    """Normalize each token without learned parameters, eps 1e-6, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def modulate(
    x: Float[Array, "b n d"], shift: Float32[Array, "#b d"], scale: Float32[Array, "#b d"]
) -> Float[Array, "b n d"]:
    """Normalize tokens, scale them by 1 + scale and shift them, in the type of `x`."""
    return ((1 + scale[:, None]) * layer_norm(x) + shift[:, None]).astype(x.dtype)


def add_gated(
    x: Float[Array, "b n d"], gate: Float32[Array, "#b d"], update: Float[Array, "b n d"]
) -> Float[Array, "b n d"]:
    """Add a residual update, multiplied by its gate."""
    return x + gate[:, None].astype(x.dtype) * update


def _make_numerics(compute: config.Compute) -> dict[str, Any]:
    """Return the arguments of a block's linear layer that say how it multiplies."""
    return {
        "dtype": jnp.dtype(compute.dtype),
        "dot_general": PRODUCTS[compute.product_dtype],
    }


class SelfAttention(nnx.Module):
    """Projections of one stream's attention: queries and keys with RMS norms, values, output."""

    def __init__(
        self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs, proj_bias: bool = True
    ):
        heads, numerics = (model.heads, model.head_dim), _make_numerics(compute)
        dtype = numerics["dtype"]
        self.qkv = nnx.LinearGeneral(model.hidden, (3, *heads), **numerics, rngs=rngs)
        self.query_norm = nnx.RMSNorm(model.head_dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.key_norm = nnx.RMSNorm(model.head_dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.proj = nnx.LinearGeneral(
            heads, model.hidden, axis=(-2, -1), use_bias=proj_bias, **numerics, rngs=rngs
        )

    def project_qkv(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n h k"], ...]:
        """Compute normalized queries, normalized keys, and values."""
        q, k, v = jnp.unstack(self.qkv(x), axis=2)
        return self.query_norm(q), self.key_norm(k), v


class MLP(nnx.Module):
    """Two linear layers with GELU (tanh form) between them."""

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        numerics = _make_numerics(compute)
        self.linear_in = nnx.Linear(model.hidden, model.mlp_hidden, **numerics, rngs=rngs)
        self.linear_out = nnx.Linear(model.mlp_hidden, model.hidden, **numerics, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Apply the MLP to each token."""
        return self.linear_out(nnx.gelu(self.linear_in(x), approximate=True))


class Stream(nnx.Module):
    """Weights of one stream, image or text, of a double block."""

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        self.attention = SelfAttention(model, compute, rngs)
        self.mlp = MLP(model, compute, rngs)

    def compute_qkv(
        self, x: Float[Array, "b n d"], vectors: Float32[Array, "#b 6 d"]
    ) -> tuple[Float[Array, "b n h k"], ...]:
        """Compute queries, keys and values of the modulated stream."""
        return self.attention.project_qkv(modulate(x, vectors[:, 0], vectors[:, 1]))

    def add_updates(
        self,
        x: Float[Array, "b n d"],
        attention_output: Float[Array, "b n h k"],
        vectors: Float32[Array, "#b 6 d"],
    ) -> Float[Array, "b n d"]:
        """Add the gated updates of the attention, then of the MLP, to the stream."""
        x = add_gated(x, vectors[:, 2], self.attention.proj(attention_output))
        return add_gated(x, vectors[:, 5], self.mlp(modulate(x, vectors[:, 3], vectors[:, 4])))


class DoubleBlock(nnx.Module):
    """MMDiT block (arXiv 2403.03206): separate weights for image and text, joint attention."""

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        self.image = Stream(model, compute, rngs)
        self.text = Stream(model, compute, rngs)

    def __call__(
        self,
        image: Float[Array, "b n d"],
        text: Float[Array, "b l d"],
        image_vectors: Float32[Array, "#b 6 d"],
        text_vectors: Float32[Array, "#b 6 d"],
        rope: Float32[Array, "2 joint 1 half"],
        attend: Attend,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b l d"]]:
        """Update image and text tokens."""
        qkv_pairs = zip(
            self.image.compute_qkv(image, image_vectors), self.text.compute_qkv(text, text_vectors)
        )
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in qkv_pairs)
        output = attend(apply_rope(q, rope), apply_rope(k, rope), v)
        n = image.shape[1]
        image = self.image.add_updates(image, output[:, :n], image_vectors)
        return image, self.text.add_updates(text, output[:, n:], text_vectors)


class TextBlock(Stream):
    """A pre-norm block of text tokens alone, without modulation."""

    def __call__(
        self, text: Float[Array, "b l d"], rope: Float32[Array, "2 l 1 half"], attend: Attend
    ) -> Float[Array, "b l d"]:
        """Update text tokens."""
        # Shifts and scales of 0 and gates of 1 turn modulation off.
        vectors = jnp.zeros((1, 6, text.shape[-1])).at[:, 2::3].set(1)
        q, k, v = self.compute_qkv(text, vectors)
        return self.add_updates(text, attend(apply_rope(q, rope), apply_rope(k, rope), v), vectors)


class SingleBlock(nnx.Module):
    """A block with attention and MLP in parallel on the joint sequence (arXiv 2302.05442)."""

    def __init__(self, model: config.Model, compute: config.Compute, rngs: nnx.Rngs):
        # The checkpoints' fused output matrix has one bias; the MLP keeps it.
        self.attention = SelfAttention(model, compute, rngs, proj_bias=False)
        self.mlp = MLP(model, compute, rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        vectors: Float32[Array, "#b 3 d"],
        rope: Float32[Array, "2 n 1 half"],
        attend: Attend,
    ) -> Float[Array, "b n d"]:
        """Update the joint tokens."""
        y = modulate(x, vectors[:, 0], vectors[:, 1])
        q, k, v = self.attention.project_qkv(y)
        output = attend(apply_rope(q, rope), apply_rope(k, rope), v)
        return add_gated(x, vectors[:, 2], self.attention.proj(output) + self.mlp(y))
