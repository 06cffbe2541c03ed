"""Joint attention over [image, text] tokens, masked by a length: one function, four backends."""

import math
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from radiance.distributed.sharding import shard_map_batch_and_heads

LANES = 128  # of a TPU: Splash needs head sizes and token blocks that are multiples of it
MAX_SPLASH_BLOCK = 1024  # tokens of a Splash block at most; larger ones are faster while they fit
MAX_CHUNK_SIZE = 512  # queries of a chunk at most
MAX_LOGITS_BYTES = 1 << 29  # bytes of attention logits that may be in memory at the same time


def attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    kv_len: Int[Array, " b"] | None,
    backend: str = "auto",
) -> Float[Array, "b n h k"]:
    """Compute scaled dot-product attention to the first `kv_len` tokens of each sample.

    Chroma's mask is the outer product of the visible tokens with themselves. Hidden tokens come
    last, so that this length expresses the same mask. Rows beyond `kv_len` differ: here they attend
    to something, so that nothing becomes NaN, but no later layer reads them. Softmax is computed in
    float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        kv_len: Number of visible tokens of each sample; None for all.
        backend: "xla" computes all logits at once, on any device; it is the reference of the
            others. "chunked" is "xla" for some queries at a time, in the backward pass too, so that
            memory grows with n and not with n². "cudnn" is NVIDIA's fused kernel, for bfloat16 and
            float16. "splash" is the TPU's fused kernel. "auto" calls `select_backend`.

    Returns:
        Weighted means of the values, in the type of `q`.
    """
    if backend == "auto":
        backend = select_backend(jax.default_backend(), q.shape, q.dtype)
    return BACKENDS[backend](q, k, v, kv_len)


def select_backend(platform: str, shape: tuple[int, ...], dtype: jnp.dtype) -> str:
    """Select the fastest backend for a platform and a type.

    Args:
        platform: JAX's name of the device type, such as "cpu", "gpu" or "tpu".
        shape: Shape [b, n, h, k] of the queries.
        dtype: Type of the queries.

    Returns:
        A key of `BACKENDS`.
    """
    b, n, h, _ = shape
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda") and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "xla" if 4 * b * h * n * n <= MAX_LOGITS_BYTES else "chunked"


def _attend_xla(q, k, v, kv_len):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=kv_len, implementation="xla")


def _attend_chunked(q, k, v, kv_len):
    b, n, h, _ = q.shape
    chunk_size = max(1, min(MAX_CHUNK_SIZE, MAX_LOGITS_BYTES // (4 * b * h * n)))
    num_chunks = -(-n // chunk_size)
    padded_q = jnp.pad(q, ((0, 0), (0, num_chunks * chunk_size - n), (0, 0), (0, 0)))
    chunks = einops.rearrange(padded_q, "b (chunks n) h k -> chunks b n h k", n=chunk_size)
    out = jax.lax.map(jax.checkpoint(lambda chunk: _attend_xla(chunk, k, v, kv_len)), chunks)
    return einops.rearrange(out, "chunks b n h k -> b (chunks n) h k")[:, :n]


def _attend_cudnn(q, k, v, kv_len):
    # cuDNN builds its padding mask from the lengths of queries and of keys: give both or none.
    q_lengths = None if kv_len is None else jnp.full_like(kv_len, q.shape[1])
    return jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=q_lengths, key_value_seq_lengths=kv_len, implementation="cudnn"
    )


def _attend_splash(q, k, v, kv_len, interpret: bool = False):
    """Pad tokens and heads to multiples of the lanes, and run Splash attention by segments.

    Padding and hidden tokens form a segment of their own. Hidden rows attend to each other, as
    Splash cannot leave a row empty.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, n, _, head_dim = q.shape
    padded_length = -(-n // LANES) * LANES
    block_size = next(
        x for x in range(min(MAX_SPLASH_BLOCK, padded_length), 0, -LANES) if padded_length % x == 0
    )
    padded_head_dim = -(-head_dim // LANES) * LANES

    def pad_tokens_and_heads(x):
        padding = ((0, 0), (0, padded_length - n), (0, 0), (0, padded_head_dim - head_dim))
        return einops.rearrange(jnp.pad(x, padding), "b n h k -> b h n k")

    def attend_on_device(q, k, v, kv_len):
        num_heads = q.shape[1]
        mask = masks.MultiHeadMask(
            [masks.FullMask((padded_length, padded_length)) for _ in range(num_heads)]
        )
        block_sizes = splash.BlockSizes(
            block_q=block_size,
            block_kv=block_size,
            block_kv_compute=block_size,
            block_q_dkv=block_size,
            block_kv_dkv=block_size,
            block_kv_dkv_compute=block_size,
            use_fused_bwd_kernel=True,
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
    return einops.rearrange(out, "b h n k -> b n h k")[:, :n, :, :head_dim]


BACKENDS: dict[str, Callable] = {
    "xla": _attend_xla,
    "chunked": _attend_chunked,
    "cudnn": _attend_cudnn,
    "splash": _attend_splash,
}
