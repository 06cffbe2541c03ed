"""Joint attention over [image, text], masked by a length: one function and four ways to compute it."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from radiance.distributed.sharding import shard_map_batch_and_heads

LANES = 128  # of a TPU: splash's heads and blocks of tokens are multiples of it
MAX_SPLASH_BLOCK = 1024  # tokens of a block at most; larger ones are faster while they fit
MAX_CHUNK_SIZE = 512  # queries at a time in pieces
MAX_LOGITS_BYTES = 1 << 29  # bytes up to which all logits may stand in memory at once


def attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b n h k"],
    v: Float[Array, "b n h k"],
    kv_len: Int[Array, " b"] | None,
    backend: str = "auto",
) -> Float[Array, "b n h k"]:
    """Scaled dot-product attention of every token to the first `kv_len` tokens of its own sample (to all when None).

    Chroma's mask is the outer product of the kept tokens with themselves. With the hidden tokens last it is this one number:
    rows beyond `kv_len` differ (here they attend to something, so that nothing becomes NaN), and nobody reads them. Softmax is
    computed in float32.

    backend: auto takes the fastest for the device and the type, see `fastest`.
    xla: all logits at once, on any device; the oracle of the others.
    pieces: `xla` for some queries at a time, in the backward pass too, so that memory grows with n and not with n².
    cudnn: NVIDIA's fused kernel, by lengths; bfloat16 and float16 alone.
    splash: the TPU's fused kernel, by segments.
    """
    if backend == "auto":
        backend = select_backend(jax.default_backend(), q.shape, q.dtype)
    return BACKENDS[backend](q, k, v, kv_len)


def select_backend(platform: str, shape: tuple[int, ...], dtype: jnp.dtype) -> str:
    """The backend for queries of `shape` [b, n, h, k]."""
    b, n, h, _ = shape
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda") and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "xla" if 4 * b * h * n * n <= MAX_LOGITS_BYTES else "chunked"


def _attend_xla(q, k, v, kv_len):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=kv_len, implementation="xla")


def _attend_chunked(q, k, v, kv_len):
    b, n, h, head_dim = q.shape
    chunk_size = max(1, min(MAX_CHUNK_SIZE, MAX_LOGITS_BYTES // (4 * b * h * n)))
    num_chunks = -(-n // chunk_size)
    padded_q = jnp.pad(q, ((0, 0), (0, num_chunks * chunk_size - n), (0, 0), (0, 0)))
    chunks = padded_q.reshape(b, num_chunks, chunk_size, h, head_dim).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda chunk: _attend_xla(chunk, k, v, kv_len)), chunks)
    return out.swapaxes(0, 1).reshape(b, num_chunks * chunk_size, h, head_dim)[:, :n]


def _attend_cudnn(q, k, v, kv_len):
    # Lengths of queries too, or none: cuDNN's mask of padding is made of both.
    q_lengths = None if kv_len is None else jnp.full_like(kv_len, q.shape[1])
    return jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=q_lengths, key_value_seq_lengths=kv_len, implementation="cudnn"
    )


def _attend_splash(q, k, v, kv_len, interpret: bool = False):
    """Tokens and heads are padded to multiples of the lanes; what is padded is a segment of its own, with the hidden tokens.

    Scores of hidden rows are those among themselves: splash cannot leave a row empty.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, n, h, head_dim = q.shape
    padded_length = -(-n // LANES) * LANES
    block_size = next(
        x for x in range(min(MAX_SPLASH_BLOCK, padded_length), 0, -LANES) if padded_length % x == 0
    )
    padded_head_dim = -(-head_dim // LANES) * LANES

    def pad_tokens_and_heads(x):  # [b, n, h, k] → [b, h, length, wide]
        return jnp.pad(
            x, ((0, 0), (0, padded_length - n), (0, 0), (0, padded_head_dim - head_dim))
        ).swapaxes(1, 2)

    def attend_on_device(q, k, v, kv_len):
        num_heads = q.shape[1]
        block_sizes = splash.BlockSizes(
            block_q=block_size, block_kv=block_size, block_kv_compute=block_size, block_q_dkv=block_size, block_kv_dkv=block_size, block_kv_dkv_compute=block_size,
            use_fused_bwd_kernel=True,
        )  # fmt: skip
        mask = masks.MultiHeadMask(
            [masks.FullMask((padded_length, padded_length)) for _ in range(num_heads)]
        )
        kernel = splash.make_splash_mha(
            mask, block_sizes=block_sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        segment_ids = (jnp.arange(padded_length) < kv_len[:, None]).astype(jnp.int32)
        return jax.vmap(
            lambda q, k, v, sample_segment_ids: kernel(
                q, k, v, segment_ids=splash.SegmentIds(sample_segment_ids, sample_segment_ids)
            )
        )(q, k, v, segment_ids)

    if kv_len is None:
        kv_len = jnp.full((b,), n, jnp.int32)
    scaled_q = q / math.sqrt(head_dim)
    out = shard_map_batch_and_heads(attend_on_device)(
        pad_tokens_and_heads(scaled_q), pad_tokens_and_heads(k), pad_tokens_and_heads(v), kv_len
    )
    return out.swapaxes(1, 2)[:, :n, :, :head_dim]


BACKENDS: dict[str, Callable] = {
    "xla": _attend_xla,
    "chunked": _attend_chunked,
    "cudnn": _attend_cudnn,
    "splash": _attend_splash,
}
