"""Attention maps of the image tokens, block by block.

Fused kernels do not return the attention probabilities, so they are computed from queries and keys.
Keys are in the network's order: image tokens, registers, real text tokens, padding tokens.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from radiance import config
from radiance.model.attention import attention
from radiance.model.transformer import Params, bind_model


class AttentionMaps(NamedTuple):
    """Attention of the image tokens, as fractions of 1; blocks on axis 0, double blocks first.

    Attributes:
        key_attention: Attention to each key, averaged over the image tokens.
        padding_attention: Attention of each image token to all padding tokens of the text.
    """

    key_attention: Float32[Array, "blocks b h joint"]
    padding_attention: Float32[Array, "blocks b h n"]


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
    """Compute the attention maps of a network that reads no pooled text.

    One block's probabilities are in memory at a time.

    Args:
        params: Parameters of the network.
        image: See `Transformer.__call__`, also for the next three.
        text: Output of the text encoder.
        lengths: Number of real text tokens.
        time: Times; 1 is noise, 0 is the image.
        model: Sizes of the network.
        compute: Types and backends.

    Returns:
        The maps of all double and single blocks.
    """
    network = bind_model(model, compute, params)
    x, y, rope, kv_len = network.embed_inputs(image.astype(jnp.float32), text, lengths)
    n, joint = x.shape[1], x.shape[1] + y.shape[1]
    is_padding = jnp.arange(joint) >= (n + model.registers + lengths)[:, None]

    def attend(q, k, v, kv_len):
        weights = attention_probabilities(q[:, :n], k, kv_len)
        padding_attention = jnp.einsum("bhnm,bm->bhn", weights, is_padding)
        maps = AttentionMaps(weights.mean(axis=2), padding_attention)
        return attention(q, k, v, kv_len, compute.attention), maps

    _, maps = network.apply_blocks(x, y, network.modulation(time, None), rope, kv_len, attend)
    return maps


def attention_probabilities(
    q: Float[Array, "b n h k"], k: Float[Array, "b joint h k"], kv_len: Int[Array, " b"] | None
) -> Float32[Array, "b h n joint"]:
    """Compute the weights of the values in `attention`.

    Args:
        q: Queries.
        k: Keys.
        kv_len: Number of visible keys; None for all.

    Returns:
        Probabilities; they add up to 1 over the keys.
    """
    scores = jnp.einsum("bnhk,bmhk->bhnm", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    if kv_len is not None:
        scores = jnp.where(jnp.arange(k.shape[1]) < kv_len[:, None, None, None], scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)
