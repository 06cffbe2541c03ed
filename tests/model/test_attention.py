"""Attention against a mask of pairs in float64, its backends, and rotary positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance.model import attention as attention_module
from radiance.model import rope
from radiance.model.rope import make_position_ids, make_rope_table
from radiance.model.transformer import visible_lengths


def attention(q, k, v, kv_len):
    return attention_module.attention(*map(jnp.asarray, (q, k, v)), kv_len)


def rotate(x, table):
    return rope.apply_rope(jnp.asarray(x), jnp.asarray(table))


N, L, HEADS, SIZE = 6, 7, 2, 8  # image tokens, text tokens
LENGTHS = np.array([1, 3, 6, 7, 0], np.int32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def attend_with_pair_mask(q, k, v, num_visible):
    """Attend in float64 with text first, where both tokens of a pair are visible."""
    swap = np.r_[N : N + L, :N]
    q, k, v = (np.asarray(x, np.float64)[:, swap] for x in (q, k, v))
    is_visible = np.concatenate(
        [np.arange(L) < num_visible[:, None], np.ones((len(num_visible), N), bool)], axis=1
    )
    mask = is_visible[:, None, :, None] & is_visible[:, None, None, :]
    logits = np.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(mask, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    # Rows of hidden tokens are all zero.
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    output, swap_back = np.einsum("bhqs,bshk->bqhk", weights, v), np.argsort(swap)
    return output[:, swap_back], is_visible[:, swap_back]


@pytest.mark.parametrize("masking", ["one_pad", "strict", "off"])
def test_a_length_masks_as_the_mask_of_pairs(masking):
    q, k, v = (normal(len(LENGTHS), N + L, HEADS, SIZE, seed=s) for s in range(3))
    num_visible = {
        "one_pad": np.minimum(LENGTHS + 1, L),
        "strict": LENGTHS,
        "off": np.full_like(LENGTHS, L),
    }[masking]
    visible = np.asarray(visible_lengths(jnp.asarray(LENGTHS), L, masking))
    np.testing.assert_array_equal(visible, num_visible)
    ours = np.asarray(attention(q, k, v, jnp.asarray(N + visible)))
    expected, is_read = attend_with_pair_mask(q, k, v, num_visible)
    np.testing.assert_allclose(ours[is_read], expected[is_read], atol=2e-6)
    assert np.isfinite(ours).all()
    if masking == "off":
        np.testing.assert_array_equal(ours, attention(q, k, v, None))


def test_hidden_tokens_have_no_influence_and_no_gradient():
    q, k, v = (normal(len(LENGTHS), N + L, HEADS, SIZE, seed=s) for s in range(3))
    kv_len = jnp.asarray(N + LENGTHS)
    hidden = np.arange(N + L) >= np.asarray(kv_len)[:, None]

    @jax.jit
    def run(k, v):
        return jax.vjp(lambda k, v: attention(q, k, v, kv_len), k, v)

    out, pull = run(k, v)
    for gradient in pull(jnp.ones_like(out)):
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[hidden] == 0).all()
        assert (np.asarray(gradient)[~hidden] != 0).any()
    other_k, other_v = (
        np.where(hidden[..., None, None], np.float32(1e4), k),
        np.where(hidden[..., None, None], np.float32(-3e4), v),
    )
    np.testing.assert_array_equal(run(other_k, other_v)[0], out)
    last = np.asarray(kv_len)[:, None] - 1 == np.arange(N + L)
    assert np.abs(run(k + last[..., None, None], v)[0] - out).max(axis=(1, 2, 3)).min() > 1e-3


# --- backends -----------------------------------------------------------------------

SHAPE = (3, 200, 2, 24)  # no size is a multiple of 128
KV_LEN = jnp.asarray([37, 200, 129])


def forward_and_backward(attend, kv_len, dtype=jnp.float32):
    q, k, v, weights = (jnp.asarray(normal(*SHAPE, seed=s), dtype) for s in range(4))
    is_read = (jnp.arange(SHAPE[1]) < (SHAPE[1] if kv_len is None else kv_len[:, None]))[
        ..., None, None
    ]
    out, back = jax.vjp(lambda q, k, v: jnp.where(is_read, attend(q, k, v, kv_len), 0), q, k, v)
    return out, *back(weights)


@pytest.mark.parametrize("kv_len", [KV_LEN, None], ids=["lengths", "all"])
@pytest.mark.parametrize("backend", ["chunked", "splash"])
def test_backends_equal_xla(backend, kv_len, monkeypatch):
    """Compare outputs and gradients for mixed lengths; Splash runs in its interpreter."""
    monkeypatch.setattr(attention_module, "MAX_CHUNK_SIZE", 48)
    backends = attention_module.BACKENDS | {
        "splash": partial(attention_module.BACKENDS["splash"], interpret=True)
    }
    expected = forward_and_backward(backends["xla"], kv_len)
    for ours, theirs in zip(
        jax.jit(partial(forward_and_backward, backends[backend], kv_len))(), expected
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_chunked_attention_needs_less_memory(monkeypatch):
    monkeypatch.setattr(attention_module, "MAX_CHUNK_SIZE", 128)

    def peak_memory(backend):
        q = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)
        program = (
            jax.jit(jax.grad(lambda q: attention_module.BACKENDS[backend](q, q, q, None).sum()))
            .lower(q)
            .compile()
        )
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * 4 * 2048**2
    assert peak_memory("xla") > logits > 2 * peak_memory("chunked")


def test_the_backend_depends_on_device_type_and_size():
    large, small = (2, 4608, 24, 128), (2, 100, 24, 128)
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert attention_module.select_backend("tpu", large, half) == "splash"
    assert attention_module.select_backend("gpu", large, half) == "cudnn"
    assert attention_module.select_backend("gpu", small, single) == "xla"
    assert attention_module.select_backend("cpu", large, single) == "chunked"
    assert attention_module.select_backend("cpu", small, single) == "xla"
    q = jnp.ones((1, 3, 1, 8))
    np.testing.assert_array_equal(
        attention_module.attention(q, q, q, None), attention_module.attention(q, q, q, None, "xla")
    )


# --- positions ------------------------------------------------------------------------------------


def test_position_ids_of_images_registers_and_text():
    ids = make_position_ids(2, 3, num_registers=1, num_text_tokens=3, sequential=False)
    assert ids.tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 2],
        [0, 1, 0],
        [0, 1, 1],
        [0, 1, 2],
    ] + 4 * [[0, 0, 0]]
    assert make_position_ids(1, 1, num_registers=2, num_text_tokens=3, sequential=True)[
        1:
    ].tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
        [2, 0, 0],
    ]


@pytest.mark.parametrize("axes", [(4, 10, 10), (16, 56, 56), (0, 2, 6)])
def test_rope_rotates_pairs_like_complex_numbers(axes):
    theta = 10_000.0
    ids = np.concatenate([make_position_ids(3, 5, 1, 4, True), [[511, 0, 0], [0, 127, 63]]])
    x = normal(2, len(ids), 3, sum(axes))
    expected = np.empty(x.shape)
    for n, position in enumerate(ids):
        at = 0
        for index, size in zip(position, axes):
            for i in range(size // 2):
                rotation = np.exp(1j * index * theta ** (-2 * i / size))
                pair = (x[:, n, :, at].astype(np.float64) + 1j * x[:, n, :, at + 1]) * rotation
                expected[:, n, :, at], expected[:, n, :, at + 1] = pair.real, pair.imag
                at += 2
    np.testing.assert_allclose(
        rotate(jnp.asarray(x), make_rope_table(ids, axes, theta)), expected, atol=1e-6
    )


def test_scores_with_rope_depend_on_distance_alone():
    ids = np.array([[0, 1, 2], [3, 4, 0], [0, 1 + 5, 2 + 7], [3, 4 + 5, 0 + 7]])
    q, k = (jnp.broadcast_to(normal(1, 1, 1, 24, seed=s), (1, 4, 1, 24)) for s in range(2))
    q, k = (rotate(x, make_rope_table(ids, (4, 10, 10), 100.0)) for x in (q, k))
    near, far = jnp.vdot(q[0, 0], k[0, 1]), jnp.vdot(q[0, 2], k[0, 3])
    np.testing.assert_allclose(near, far, atol=1e-5)
    assert abs(near - jnp.vdot(q[0, 0], k[0, 3])) > 1e-2


def test_rope_of_bfloat16_computes_in_float32():
    table = make_rope_table(make_position_ids(3, 5, 0, 4, True), (4, 10, 10), 10_000.0)
    x = jnp.asarray(normal(1, 19, 2, 24), jnp.bfloat16)
    rotated = rotate(x, table)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        rotated, rotate(x.astype(jnp.float32), table).astype(jnp.bfloat16)
    )
