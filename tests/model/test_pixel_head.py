"""The NeRF head: features, chunks, independence of patches, and precision."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance.model.pixel_head import cosine_features, normalize_columns, patchify, unpatchify
from radiance.model.transformer import bind_model
from tests.helpers.toy_models import FLOAT32, toy_model, toy_params

ROWS, COLUMNS, B = 2, 3, 2
N = ROWS * COLUMNS
MODEL = toy_model(double_blocks=0, single_blocks=1, modulation="none")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def head_inputs(model=MODEL):
    return normal(B, N, model.hidden), normal(
        B, ROWS * model.patch, COLUMNS * model.patch, 3, seed=1
    )


def lower_head(model, chunk_size, params):
    """Lower the velocity, and the gradient of Σ w·velocity to parameters, tokens and image."""
    tokens, image = head_inputs()
    weights = normal(*image.shape, seed=2)

    def loss(head, tokens, image):
        predicted = bind_model(
            model, replace(FLOAT32, head_chunk_size=chunk_size), params | dict(head=head)
        ).head(tokens, image)
        velocity = predicted if model.prediction == "velocity" else (image - predicted) / 0.3
        return jnp.vdot(weights, velocity), velocity

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(
        params["head"], tokens, image
    )


def run_head(model, chunk_size, params=None):
    params = toy_params(model) if params is None else params
    return lower_head(model, chunk_size, params).compile()(params["head"], *head_inputs())


def test_patches_are_row_major_and_join_to_the_image():
    image, p = normal(2, 8, 12, 5), 4
    patches = patchify(jnp.asarray(image), p)
    assert patches.shape == (2, 6, 16, 5)
    for row in range(8):
        for column in range(12):
            at = patches[:, (row // p) * 3 + column // p, (row % p) * p + column % p]
            np.testing.assert_array_equal(at, image[:, row, column])
    np.testing.assert_array_equal(unpatchify(patches, 8, 12, p), image)


@pytest.mark.parametrize(("patch", "freqs"), [(4, 3), (16, 8)])
def test_cosine_features_follow_their_formula(patch, freqs):
    features = cosine_features(patch, freqs)
    assert features.dtype == np.float32
    expected = np.empty((patch * patch, freqs * freqs))
    for row in range(patch):
        for column in range(patch):
            x, y = column / (patch - 1), row / (patch - 1)
            for fx in range(freqs):
                for fy in range(freqs):
                    value = np.cos(np.pi * fx * x) * np.cos(np.pi * fy * y) / (1 + fx * fy)
                    expected[row * patch + column, fx * freqs + fy] = value
    np.testing.assert_allclose(features, expected, atol=1e-6)


def test_columns_have_unit_norm():
    w = normal(2, 5, 3).astype(np.float64)
    w[0, :, 1] = 0
    w[1, :, 2] *= 1e-14  # below the minimum of 1e-12
    ours = np.asarray(normalize_columns(jnp.asarray(w, jnp.float32)))
    np.testing.assert_allclose(
        ours, w / np.maximum(np.linalg.norm(w, axis=-2, keepdims=True), 1e-12), atol=1e-6
    )
    gradient = jax.grad(lambda w: normalize_columns(w).sum())(jnp.asarray(w, jnp.float32))
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def unchunked():
    return {p: run_head(replace(MODEL, prediction=p), 0) for p in ("velocity", "x0")}


@pytest.mark.parametrize(
    ("chunk_size", "prediction"), [(1, "velocity"), (3, "velocity"), (5, "velocity"), (5, "x0")]
)
def test_chunks_do_not_change_the_result(unchunked, chunk_size, prediction):
    chunked = run_head(replace(MODEL, prediction=prediction), chunk_size)
    for path, ours in jax.tree_util.tree_leaves_with_path(chunked):
        expected = dict(jax.tree_util.tree_leaves_with_path(unchunked[prediction]))[path]
        assert np.abs(expected).max() > 0, path
        np.testing.assert_allclose(
            ours, expected, atol=1e-5 * float(np.abs(expected).max()), err_msg=str(path)
        )


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_a_chunk_of_all_tokens_gives_the_same_program(prediction):
    model = replace(MODEL, prediction=prediction)
    unchunked, same, larger, smaller = (
        lower_head(model, chunk_size, toy_params(model)).as_text()
        for chunk_size in (0, N, N + 4, N - 1)
    )
    assert unchunked == same == larger != smaller


def test_patches_are_independent_before_the_convolution():
    model = replace(MODEL, head="nerf_linear")
    params, (tokens, image) = toy_params(model), head_inputs()
    head = jax.jit(lambda tokens, image: bind_model(model, FLOAT32, params).head(tokens, image))
    other_tokens, other_image = tokens.copy(), image.copy()
    other_tokens[:, 4] *= -1  # second row, second column
    other_image[:, 4:, :4] += 1  # second row, first column
    changed = (
        np.abs(head(other_tokens, other_image) - head(tokens, image))
        .max(axis=(0, 3))
        .reshape(ROWS, 4, COLUMNS, 4)
        .max(axis=(1, 3))
        > 1e-4
    )
    assert changed.tolist() == [[False, False, False], [True, True, False]]


def test_the_gradient_is_finite_for_generated_zeros():
    params = toy_params(MODEL)
    blocks = params["head"]["blocks"]
    params_without_generator = params | dict(
        head=params["head"]
        | dict(
            blocks=blocks
            | dict(param_generator=jax.tree.map(jnp.zeros_like, blocks["param_generator"]))
        )
    )
    gradient, _ = run_head(MODEL, 3, params_without_generator)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.abs(gradient[0]["embedder"]["kernel"]).max() > 0


def test_a_bfloat16_head_reads_and_predicts_float32_pixels():
    """Changes of the input, and values of the output, may be finer than bfloat16."""
    params, (tokens, image) = toy_params(MODEL), head_inputs()
    kernel = params["head"]["embedder"]["kernel"]
    params = params | dict(
        head=params["head"]
        | dict(embedder=params["head"]["embedder"] | dict(kernel=kernel.at[:3].multiply(200)))
    )
    image[:] = 0.75
    tokens = jnp.asarray(tokens, jnp.bfloat16)
    compute = replace(FLOAT32, dtype="bfloat16")
    head = jax.jit(lambda tokens, image: bind_model(MODEL, compute, params).head(tokens, image))
    before, after = head(tokens, image), head(tokens, image + 2**-10)
    assert before.dtype == jnp.float32
    assert jnp.bfloat16(0.75) == jnp.bfloat16(0.75 + 2**-10)
    assert np.abs(before - after).max() > 1e-3
    assert (before != before.astype(jnp.bfloat16)).mean() > 0.9
    features = jax.eval_shape(
        lambda: bind_model(MODEL, compute, params).head.apply_in_chunks(
            tokens, patchify(jnp.asarray(image), MODEL.patch)
        )
    )
    assert features.dtype == jnp.float32
