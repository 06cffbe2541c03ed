"""The kinds of transformer block: double (image and text with their own weights), single (one stream), and one of text alone.

A single block's fused matrices (`linear1`, `linear2` of the checkpoints) are kept here in their parts, so that heads and MLP
channels can each be sharded; `weights/` joins and splits them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from radiance import config
from radiance.model.rope import apply_rope

Attend = Callable[
    [jax.Array, jax.Array, jax.Array], jax.Array
]  # queries, keys and values [b, n, h, k] to what they find


def layer_norm(x: Float[Array, "b n d"]) -> Float32[Array, "b n d"]:
    """Layer norm without parameters, eps 1e-6, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def modulate(
    x: Float[Array, "b n d"], shift: Float32[Array, "#b d"], scale: Float32[Array, "#b d"]
) -> Float[Array, "b n d"]:
    return ((1 + scale[:, None]) * layer_norm(x) + shift[:, None]).astype(x.dtype)


def add_gated(
    x: Float[Array, "b n d"], gate: Float32[Array, "#b d"], update: Float[Array, "b n d"]
) -> Float[Array, "b n d"]:
    return x + gate[:, None].astype(x.dtype) * update


class SelfAttention(nnx.Module):
    """Queries, keys and values of one stream, with the norms of the first two, and the way back."""

    def __init__(
        self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs, proj_bias: bool = True
    ):
        heads = (model.heads, model.head_dim)
        self.qkv = nnx.LinearGeneral(model.hidden, (3, *heads), dtype=dtype, rngs=rngs)
        self.query_norm = nnx.RMSNorm(model.head_dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.key_norm = nnx.RMSNorm(model.head_dim, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.proj = nnx.LinearGeneral(
            heads, model.hidden, axis=(-2, -1), use_bias=proj_bias, dtype=dtype, rngs=rngs
        )

    def project_qkv(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n h k"], ...]:
        q, k, v = jnp.unstack(self.qkv(x), axis=2)
        return self.query_norm(q), self.key_norm(k), v


class MLP(nnx.Module):
    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear_in = nnx.Linear(model.hidden, model.mlp_hidden, dtype=dtype, rngs=rngs)
        self.linear_out = nnx.Linear(model.mlp_hidden, model.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.linear_out(nnx.gelu(self.linear_in(x), approximate=True))


class Stream(nnx.Module):
    """One side of a double block."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = SelfAttention(model, dtype, rngs)
        self.mlp = MLP(model, dtype, rngs)

    def compute_qkv(
        self, x: Float[Array, "b n d"], vectors: Float32[Array, "#b 6 d"]
    ) -> tuple[Float[Array, "b n h k"], ...]:
        return self.attention.project_qkv(modulate(x, vectors[:, 0], vectors[:, 1]))

    def add_updates(
        self,
        x: Float[Array, "b n d"],
        attention_output: Float[Array, "b n h k"],
        vectors: Float32[Array, "#b 6 d"],
    ) -> Float[Array, "b n d"]:
        x = add_gated(x, vectors[:, 2], self.attention.proj(attention_output))
        return add_gated(x, vectors[:, 5], self.mlp(modulate(x, vectors[:, 3], vectors[:, 4])))


class DoubleBlock(nnx.Module):
    """Image and text keep their own weights and meet in the attention (MMDiT, arXiv 2403.03206)."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.image = Stream(model, dtype, rngs)
        self.text = Stream(model, dtype, rngs)

    def __call__(
        self,
        image: Float[Array, "b n d"],
        text: Float[Array, "b l d"],
        image_vectors: Float32[Array, "#b 6 d"],
        text_vectors: Float32[Array, "#b 6 d"],
        rope: Float32[Array, "2 joint 1 half"],
        attend: Attend,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b l d"]]:
        stream_pairs = zip(
            self.image.compute_qkv(image, image_vectors), self.text.compute_qkv(text, text_vectors)
        )
        q, k, v = (jnp.concatenate(stream_pair, axis=1) for stream_pair in stream_pairs)
        attention_output = attend(apply_rope(q, rope), apply_rope(k, rope), v)
        n = image.shape[1]
        return self.image.add_updates(
            image, attention_output[:, :n], image_vectors
        ), self.text.add_updates(text, attention_output[:, n:], text_vectors)


class TextBlock(Stream):
    """Attention, then MLP, of the text alone: a plain pre-norm block, which no time reaches."""

    def __call__(
        self, text: Float[Array, "b l d"], rope: Float32[Array, "2 l 1 half"], attend: Attend
    ) -> Float[Array, "b l d"]:
        identity_vectors = (
            jnp.zeros((1, 6, text.shape[-1])).at[:, 2::3].set(1)
        )  # but for the gates, which are open
        q, k, v = self.compute_qkv(text, identity_vectors)
        return self.add_updates(
            text, attend(apply_rope(q, rope), apply_rope(k, rope), v), identity_vectors
        )


class SingleBlock(nnx.Module):
    """Attention and MLP side by side on the joint sequence (arXiv 2302.05442)."""

    def __init__(self, model: config.Model, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = SelfAttention(
            model, dtype, rngs, proj_bias=False
        )  # the fused matrix has one bias: the MLP's
        self.mlp = MLP(model, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        vectors: Float32[Array, "#b 3 d"],
        rope: Float32[Array, "2 n 1 half"],
        attend: Attend,
    ) -> Float[Array, "b n d"]:
        y = modulate(x, vectors[:, 0], vectors[:, 1])
        q, k, v = self.attention.project_qkv(y)
        attention_output = attend(apply_rope(q, rope), apply_rope(k, rope), v)
        return add_gated(x, vectors[:, 2], self.attention.proj(attention_output) + self.mlp(y))
