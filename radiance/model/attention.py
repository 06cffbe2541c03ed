"""Joint attention over [image, text], masked by a length: one function and four ways to compute it."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from radiance.sharding import over_batch_and_heads

LANES = 128  # of a TPU: splash's heads and blocks of tokens are multiples of it
SPLASH_BLOCK = 1024  # tokens of a block at most; larger ones are faster while they fit
PIECE = 512  # queries at a time in pieces
LOGITS = 1 << 29  # bytes up to which all logits may stand in memory at once


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
        backend = fastest(jax.default_backend(), q.shape, q.dtype)
    return BACKENDS[backend](q, k, v, kv_len)


def fastest(platform: str, shape: tuple[int, ...], dtype: jnp.dtype) -> str:
    """The backend for queries of `shape` [b, n, h, k]."""
    b, n, h, _ = shape
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda") and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "xla" if 4 * b * h * n * n <= LOGITS else "pieces"


def _xla(q, k, v, kv_len):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=kv_len, implementation="xla")


def _pieces(q, k, v, kv_len):
    b, n, h, size = q.shape
    piece = max(1, min(PIECE, LOGITS // (4 * b * h * n)))
    count = -(-n // piece)
    padded = jnp.pad(q, ((0, 0), (0, count * piece - n), (0, 0), (0, 0)))
    parts = padded.reshape(b, count, piece, h, size).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda part: _xla(part, k, v, kv_len)), parts)
    return out.swapaxes(0, 1).reshape(b, count * piece, h, size)[:, :n]


def _cudnn(q, k, v, kv_len):
    # Lengths of queries too, or none: cuDNN's mask of padding is made of both.
    q_len = None if kv_len is None else jnp.full_like(kv_len, q.shape[1])
    return jax.nn.dot_product_attention(q, k, v, query_seq_lengths=q_len, key_value_seq_lengths=kv_len, implementation="cudnn")


def _splash(q, k, v, kv_len, interpret: bool = False):
    """Tokens and heads are padded to multiples of the lanes; what is padded is a segment of its own, with the hidden tokens.

    Scores of hidden rows are those among themselves: splash cannot leave a row empty.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, n, h, size = q.shape
    length = -(-n // LANES) * LANES
    block = next(x for x in range(min(SPLASH_BLOCK, length), 0, -LANES) if length % x == 0)
    wide = -(-size // LANES) * LANES

    def prepared(x):  # [b, n, h, k] → [b, h, length, wide]
        return jnp.pad(x, ((0, 0), (0, length - n), (0, 0), (0, wide - size))).swapaxes(1, 2)

    def on_device(q, k, v, kv_len):
        heads = q.shape[1]
        sizes = splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        )  # fmt: skip
        mask = masks.MultiHeadMask([masks.FullMask((length, length)) for _ in range(heads)])
        kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        visible = (jnp.arange(length) < kv_len[:, None]).astype(jnp.int32)
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids)))(q, k, v, visible)

    if kv_len is None:
        kv_len = jnp.full((b,), n, jnp.int32)
    scaled = q / math.sqrt(size)
    out = over_batch_and_heads(on_device)(prepared(scaled), prepared(k), prepared(v), kv_len)
    return out.swapaxes(1, 2)[:, :n, :, :size]


BACKENDS: dict[str, Callable] = {"xla": _xla, "pieces": _pieces, "cudnn": _cudnn, "splash": _splash}
