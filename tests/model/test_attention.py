from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance.model import attention as room
from radiance.model import rope
from radiance.model.rope import position_ids, rope_table
from radiance.model.transformer import visible_lengths


def attention(q, k, v, kv_len):
    return room.attention(*map(jnp.asarray, (q, k, v)), kv_len)


def rotate(x, table):
    return rope.apply_rope(jnp.asarray(x), jnp.asarray(table))


N, L, HEADS, SIZE = 6, 7, 2, 8  # image tokens, text tokens
LENGTHS = np.array([1, 3, 6, 7, 0], np.int32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def pair_masked(q, k, v, kept):
    """The specification, float64: text first, and a pair attends when both ends are kept."""
    swap = np.r_[N : N + L, :N]
    q, k, v = (np.asarray(x, np.float64)[:, swap] for x in (q, k, v))
    ends = np.concatenate([np.arange(L) < kept[:, None], np.ones((len(kept), N), bool)], axis=1)
    mask = ends[:, None, :, None] & ends[:, None, None, :]
    logits = np.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(mask, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    weights /= np.maximum(
        weights.sum(axis=-1, keepdims=True), 1e-300
    )  # rows of hidden tokens are all zero
    return np.einsum("bhqs,bshk->bqhk", weights, v)[:, np.argsort(swap)], ends[:, np.argsort(swap)]


@pytest.mark.parametrize("masking", ["one_pad", "strict", "off"])
def test_a_length_masks_as_the_pair_mask_does(masking):
    q, k, v = (normal(len(LENGTHS), N + L, HEADS, SIZE, seed=s) for s in range(3))
    kept = {
        "one_pad": np.minimum(LENGTHS + 1, L),
        "strict": LENGTHS,
        "off": np.full_like(LENGTHS, L),
    }[masking]
    visible = np.asarray(visible_lengths(jnp.asarray(LENGTHS), L, masking))
    np.testing.assert_array_equal(visible, kept)
    ours = np.asarray(attention(q, k, v, jnp.asarray(N + visible)))
    expected, read = pair_masked(q, k, v, kept)
    np.testing.assert_allclose(ours[read], expected[read], atol=2e-6)
    assert np.isfinite(ours).all()
    if masking == "off":
        np.testing.assert_array_equal(ours, attention(q, k, v, None))


def test_what_lies_beyond_the_length_has_no_influence_and_no_gradient():
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


# --- the ways to compute it -----------------------------------------------------------------------------------------------

SHAPE = (3, 200, 2, 24)  # nothing divides by 128
SEEN = jnp.asarray([37, 200, 129])


def forward_and_backward(way, kv_len, dtype=jnp.float32):
    q, k, v, weights = (jnp.asarray(normal(*SHAPE, seed=s), dtype) for s in range(4))
    read = (jnp.arange(SHAPE[1]) < (SHAPE[1] if kv_len is None else kv_len[:, None]))[
        ..., None, None
    ]
    out, back = jax.vjp(lambda q, k, v: jnp.where(read, way(q, k, v, kv_len), 0), q, k, v)
    return out, *back(weights)


@pytest.mark.parametrize("kv_len", [SEEN, None], ids=["lengths", "all"])
@pytest.mark.parametrize("way", ["chunked", "splash"])
def test_every_way_is_the_oracles(way, kv_len, monkeypatch):
    """Forward and backward, with mixed lengths; splash as its own interpreter runs it."""
    monkeypatch.setattr(room, "MAX_CHUNK_SIZE", 48)
    ways = room.BACKENDS | {"splash": partial(room.BACKENDS["splash"], interpret=True)}
    expected = forward_and_backward(ways["xla"], kv_len)
    for ours, theirs in zip(jax.jit(partial(forward_and_backward, ways[way], kv_len))(), expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_pieces_need_less_memory(monkeypatch):
    monkeypatch.setattr(room, "MAX_CHUNK_SIZE", 128)

    def room_for(way):
        q = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)
        program = (
            jax.jit(jax.grad(lambda q: room.BACKENDS[way](q, q, q, None).sum())).lower(q).compile()
        )
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * 4 * 2048**2
    assert room_for("xla") > logits > 2 * room_for("chunked")


def test_the_fastest_for_a_device():
    large, small = (2, 4608, 24, 128), (2, 100, 24, 128)
    half, single = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert room.select_backend("tpu", large, half) == "splash"
    assert room.select_backend("gpu", large, half) == "cudnn"
    assert room.select_backend("gpu", small, single) == "xla"
    assert room.select_backend("cpu", large, single) == "chunked"
    assert room.select_backend("cpu", small, single) == "xla"
    q = jnp.ones((1, 3, 1, 8))
    np.testing.assert_array_equal(
        room.attention(q, q, q, None), room.attention(q, q, q, None, "xla")
    )


# --- positions -------------------------------------------------------------------------------------------------------------


def test_position_ids():
    ids = position_ids(2, 3, num_registers=1, num_text_tokens=3, sequential=False)
    assert ids.tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 2],
        [0, 1, 0],
        [0, 1, 1],
        [0, 1, 2],
    ] + 4 * [[0, 0, 0]]
    assert position_ids(1, 1, num_registers=2, num_text_tokens=3, sequential=True)[1:].tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
        [1, 0, 0],
        [2, 0, 0],
    ]


@pytest.mark.parametrize("axes", [(4, 10, 10), (16, 56, 56), (0, 2, 6)])
def test_rope_turns_pairs_as_complex_numbers(axes):
    theta = 10_000.0
    ids = np.concatenate([position_ids(3, 5, 1, 4, True), [[511, 0, 0], [0, 127, 63]]])
    x = normal(2, len(ids), 3, sum(axes))
    expected = np.empty(x.shape)
    for n, position in enumerate(ids):
        at = 0
        for place, size in zip(position, axes):
            for i in range(size // 2):
                turn = np.exp(1j * place * theta ** (-2 * i / size))
                pair = (x[:, n, :, at].astype(np.float64) + 1j * x[:, n, :, at + 1]) * turn
                expected[:, n, :, at], expected[:, n, :, at + 1] = pair.real, pair.imag
                at += 2
    np.testing.assert_allclose(
        rotate(jnp.asarray(x), rope_table(ids, axes, theta)), expected, atol=1e-6
    )


def test_rope_makes_scores_depend_on_distance_alone():
    ids = np.array([[0, 1, 2], [3, 4, 0], [0, 1 + 5, 2 + 7], [3, 4 + 5, 0 + 7]])
    q, k = (jnp.broadcast_to(normal(1, 1, 1, 24, seed=s), (1, 4, 1, 24)) for s in range(2))
    q, k = (rotate(x, rope_table(ids, (4, 10, 10), 100.0)) for x in (q, k))
    near, far = jnp.vdot(q[0, 0], k[0, 1]), jnp.vdot(q[0, 2], k[0, 3])
    np.testing.assert_allclose(near, far, atol=1e-5)
    assert abs(near - jnp.vdot(q[0, 0], k[0, 3])) > 1e-2


def test_rope_works_in_float32_on_bfloat16():
    table = rope_table(position_ids(3, 5, 0, 4, True), (4, 10, 10), 10_000.0)
    x = jnp.asarray(normal(1, 19, 2, 24), jnp.bfloat16)
    turned = rotate(x, table)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32), table).astype(jnp.bfloat16))
