"""What the image's tokens attend to, block by block: probabilities that the fused kernels never have, computed again from queries and keys.

Keys stand in the network's order: the image's tokens, registers, the text's real tokens, its padding.
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
from radiance.model.quantized import expand_weights
from radiance.model.transformer import Params, bind_model


class AttentionMaps(NamedTuple):
    """Blocks on axis 0, the double ones first. Everything is a share of 1, of the attention of one of the image's tokens."""

    key_attention: Float32[
        Array, "blocks b h joint"
    ]  # by each key, the mean over the image's tokens
    padding_attention: Float32[
        Array, "blocks b h n"
    ]  # what each of the image's tokens gives to the text's padding


@partial(jax.jit, static_argnames=("model", "compute"))
def compute_attention_maps(
    params: Params,
    image: Float[Array, "b height width c"],
    text: Float[Array, "b l e"],
    lengths: Int[Array, " b"],
    time: Float32[Array, " b"],
    *,
    model: config.Model,
    compute: config.Compute,
) -> AttentionMaps:
    """Of the network with these arguments (see `Transformer`), which reads no pooled text. One block's probabilities are in memory at a time."""
    network = bind_model(model, compute, params)
    vectors = network.modulation(time, None)
    x, y, rope, kv_len = network.embed_inputs(image.astype(jnp.float32), text, lengths)
    n, joint = x.shape[1], x.shape[1] + y.shape[1]
    is_padding = jnp.arange(joint) >= (n + model.registers + lengths)[:, None]

    def make_recording_attend(maps_of_block: list) -> Attend:
        def attend(q, k, v):
            weights = attention_probabilities(q[:, :n], k, kv_len)
            maps_of_block.append(
                (weights.mean(axis=2), jnp.einsum("bhnm,bm->bhn", weights, is_padding))
            )
            return attention(q, k, v, kv_len, compute.attention)

        return attend

    def scan_double_block(carry, block_vectors):
        block, image_vectors, text_vectors = block_vectors
        carry = expand_weights(block)(
            *carry, image_vectors, text_vectors, rope, make_recording_attend(maps_of_block := [])
        )
        return carry, maps_of_block[0]

    def scan_single_block(x, block_vectors):
        block, vectors = block_vectors
        x = expand_weights(block)(x, vectors, rope, make_recording_attend(maps_of_block := []))
        return x, maps_of_block[0]

    block_maps = []
    if model.double_blocks:
        (x, y), maps = jax.lax.scan(
            scan_double_block, (x, y), (network.double, vectors.double_image, vectors.double_text)
        )
        block_maps.append(maps)
    if model.single_blocks:
        _, maps = jax.lax.scan(
            scan_single_block, jnp.concatenate([x, y], axis=1), (network.single, vectors.single)
        )
        block_maps.append(maps)
    return AttentionMaps(*(jnp.concatenate(field_values) for field_values in zip(*block_maps)))


def attention_probabilities(
    q: Float[Array, "b n h k"], k: Float[Array, "b joint h k"], kv_len: Int[Array, " b"] | None
) -> Float32[Array, "b h n joint"]:
    """What `attention` weighs values with."""
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32) / math.sqrt(
        q.shape[-1]
    )
    if kv_len is not None:
        scores = jnp.where(jnp.arange(k.shape[1]) < kv_len[:, None, None, None], scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)
