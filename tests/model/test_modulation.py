"""Modulation: embeddings, the order of vectors, initial zeros, and inputs."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radiance.model.modulation import (
    index_embeddings,
    join_vectors,
    make_modulation,
    sinusoidal_embedding,
    split_vectors,
)
from radiance.model.transformer import bind_model
from tests.helpers.toy_models import FLOAT32, toy_model, toy_params

KINDS = {
    "approximator": dict(),
    "per_block": dict(modulation="per_block", pooled_dim=5, guidance_embed=True, head="linear"),
    "per_block_nerf": dict(modulation="per_block"),
    "shared": dict(modulation="shared", pooled_dim=5),
    "none": dict(modulation="none"),
}
TIME = np.array([0.25, 0.5, 1.0], np.float32)


@partial(jax.jit, static_argnames="model")
def run(model, params, time, guidance=None, pooled=None):
    return bind_model(model, FLOAT32, params).modulation(time, guidance, pooled)


def sample_pooled(model):
    return (
        jnp.asarray(np.random.default_rng(3).standard_normal((3, model.pooled_dim), np.float32))
        if model.pooled_dim
        else None
    )


@pytest.mark.parametrize(("count", "width"), [(344, 32), (11, 8)])
def test_index_embeddings_round_like_the_published_code(count, width):
    half = width // 2
    expected, naive = np.empty((2, count, width))
    for j in range(half):
        exponent = np.float32(np.float32(-math.log(10_000.0)) * np.float32(j)) / np.float32(half)
        frequency = np.float32(math.exp(float(exponent)))
        for m in range(count):
            angle = float(np.float32(np.float32(1000 * m) * frequency))
            expected[m, [j, half + j]] = math.cos(angle), math.sin(angle)
            exact = 1000 * m * 10_000.0 ** (-j / half)
            naive[m, [j, half + j]] = math.cos(exact), math.sin(exact)
    table = index_embeddings(count, width)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, atol=1e-7)
    if count == 344:
        assert np.abs(table - naive).max() > 1e-3  # rounding has an effect


def test_sinusoids_are_cosines_then_sines_of_a_thousand_times_x():
    x, half = np.array([0.0, 0.001, 0.25, 1.0], np.float32), 8
    angles = np.outer(1000 * x.astype(np.float64), [10_000.0 ** (-j / half) for j in range(half)])
    np.testing.assert_allclose(
        sinusoidal_embedding(jnp.asarray(x), 16),
        np.concatenate([np.cos(angles), np.sin(angles)], axis=1),
        atol=1e-4,
    )


def test_vectors_are_in_chromas_order():
    doubles, singles, b = 2, 3, 2
    count = 3 * singles + 12 * doubles + 2
    assert count == toy_model(double_blocks=doubles, single_blocks=singles).num_modulation_vectors
    x = np.arange(count)[None, :, None] + 1000 * np.arange(b)[:, None, None] + np.zeros((1, 1, 4))
    vectors = split_vectors(jnp.asarray(x, jnp.float32), doubles, singles)
    for sample in range(b):
        at = iter(range(1000 * sample, 1000 * sample + count))
        for kind, blocks, each in (
            (vectors.single, singles, 3),
            (vectors.double_image, doubles, 6),
            (vectors.double_text, doubles, 6),
        ):
            for block in range(blocks):
                assert kind[block, sample, :, 0].tolist() == [next(at) for _ in range(each)]
        assert vectors.output[sample, :, 0].tolist() == [next(at), next(at)]
    np.testing.assert_array_equal(join_vectors(vectors), x)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_vectors_are_zero(kind):
    model = toy_model(**KINDS[kind])

    @jax.jit
    def initialize(key):
        return make_modulation(model, jnp.dtype("float32"), nnx.Rngs(key))(
            jnp.asarray(TIME), jnp.ones(3), sample_pooled(model)
        )

    vectors = initialize(jax.random.key(0))
    d, rows = model.hidden, 1 if kind == "none" else 3
    assert [x.shape for x in vectors] == [
        (2, rows, 6, d),
        (2, rows, 6, d),
        (3, rows, 3, d),
        (rows, 2, d),
    ]
    assert all(x.dtype == jnp.float32 and (np.asarray(x) == 0).all() for x in vectors)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_depend_on_the_inputs_that_the_network_reads(kind):
    model = toy_model(**KINDS[kind])
    params, pooled = toy_params(model), sample_pooled(model)

    def changes_of_vectors(**changes):
        arguments = dict(time=TIME, guidance=np.zeros(3, np.float32), pooled=pooled) | changes
        shifts = [np.abs(x - y).max() for x, y in zip(run(model, params, **arguments), base)]
        # The NeRF head does not read the output vectors, which are zero.
        return shifts[:-1] if kind == "per_block_nerf" else shifts

    base = run(model, params, TIME, np.zeros(3, np.float32), pooled)
    if kind == "none":
        assert max(changes_of_vectors(time=TIME / 2)) == 0
        return
    assert min(changes_of_vectors(time=TIME / 2)) > 1e-3
    assert max(changes_of_vectors(guidance=None)) == 0
    reads_guidance = model.modulation == "approximator" or model.guidance_embed
    assert (
        min(changes_of_vectors(guidance=np.full(3, 2.0, np.float32))) > 1e-3
        if reads_guidance
        else max(changes_of_vectors(guidance=np.full(3, 2.0, np.float32))) == 0
    )
    if model.pooled_dim:
        assert min(changes_of_vectors(pooled=-pooled)) > 1e-3
        with pytest.raises(ValueError, match="pooled_dim"):
            run(model, params, TIME)
    # Every sample has its own vectors.
    second = run(
        model, params, TIME[1:2], np.zeros(1, np.float32), None if pooled is None else pooled[1:2]
    )
    for x, y in zip(second, base):
        np.testing.assert_allclose(x, y[..., 1:2, :, :], atol=1e-5)
