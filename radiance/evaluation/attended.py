"""What the picture's tokens attend to, block by block: probabilities that the fused kernels never have, computed again from queries and keys.

Keys stand in the network's order: the picture's tokens, registers, the text's real tokens, its padding.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from radiance import config
from radiance.model.attention import attention
from radiance.model.blocks import Attend
from radiance.model.stored import expanded
from radiance.model.transformer import Params, bind


class Attended(NamedTuple):
    """Blocks on axis 0, the double ones first. Everything is a share of 1, of the attention of one of the picture's tokens."""

    received: Float32[Array, "blocks b h joint"]  # by each key, the mean over the picture's tokens
    padding: Float32[Array, "blocks b h n"]  # what each of the picture's tokens gives to the text's padding


@partial(jax.jit, static_argnames=("model", "compute"))
def attended(
    params: Params,
    image: Float[Array, "b height width c"],
    text: Float[Array, "b l e"],
    lengths: Int[Array, " b"],
    time: Float32[Array, " b"],
    *,
    model: config.Model,
    compute: config.Compute,
) -> Attended:
    """Of the network with these arguments (see `Transformer`), which reads no pooled text. One block's probabilities are in memory at a time."""
    network = bind(model, compute, params)
    vectors = network.modulation(time, None)
    x, y, rope, kv_len = network.embed(image.astype(jnp.float32), text, lengths)
    n, joint = x.shape[1], x.shape[1] + y.shape[1]
    is_padding = jnp.arange(joint) >= (n + model.registers + lengths)[:, None]

    def watched(seen: list) -> Attend:
        def attend(q, k, v):
            given = probabilities(q[:, :n], k, kv_len)
            seen.append((given.mean(axis=2), jnp.einsum("bhnm,bm->bhn", given, is_padding)))
            return attention(q, k, v, kv_len, compute.attention)

        return attend

    def double(carry, block_vectors):
        block, image_vectors, text_vectors = block_vectors
        carry = expanded(block)(*carry, image_vectors, text_vectors, rope, watched(seen := []))
        return carry, seen[0]

    def single(x, block_vectors):
        block, vectors = block_vectors
        x = expanded(block)(x, vectors, rope, watched(seen := []))
        return x, seen[0]

    parts = []
    if model.double_blocks:
        (x, y), found = jax.lax.scan(double, (x, y), (network.double, vectors.double_image, vectors.double_text))
        parts.append(found)
    if model.single_blocks:
        _, found = jax.lax.scan(single, jnp.concatenate([x, y], axis=1), (network.single, vectors.single))
        parts.append(found)
    return Attended(*(jnp.concatenate(kind) for kind in zip(*parts)))


def probabilities(
    q: Float[Array, "b n h k"], k: Float[Array, "b joint h k"], kv_len: Int[Array, " b"] | None
) -> Float32[Array, "b h n joint"]:
    """What `attention` weighs values with."""
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if kv_len is not None:
        scores = jnp.where(jnp.arange(k.shape[1]) < kv_len[:, None, None, None], scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)
