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


def lower_head(model, tile, params):
    """Velocity, and the gradient of Σ w·velocity to the head's parameters, the tokens and the image."""
    tokens, image = head_inputs()
    weights = normal(*image.shape, seed=2)

    def loss(head, tokens, image):
        predicted = bind_model(
            model, replace(FLOAT32, head_chunk_size=tile), params | dict(head=head)
        ).head(tokens, image)
        velocity = predicted if model.prediction == "velocity" else (image - predicted) / 0.3
        return jnp.vdot(weights, velocity), velocity

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True)).lower(
        params["head"], tokens, image
    )


def run_head(model, tile, params=None):
    params = toy_params(model) if params is None else params
    return lower_head(model, tile, params).compile()(params["head"], *head_inputs())


def test_unfold_order_and_the_way_back():
    image, p = normal(2, 8, 12, 5), 4
    patches = patchify(jnp.asarray(image), p)
    assert patches.shape == (2, 6, 16, 5)
    for row in range(8):
        for column in range(12):
            at = patches[:, (row // p) * 3 + column // p, (row % p) * p + column % p]
            np.testing.assert_array_equal(at, image[:, row, column])
    np.testing.assert_array_equal(unpatchify(patches, 8, 12, p), image)


@pytest.mark.parametrize(("patch", "freqs"), [(4, 3), (16, 8)])
def test_cosine_features(patch, freqs):
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


def test_unit_columns():
    w = normal(2, 5, 3).astype(np.float64)
    w[0, :, 1] = 0
    w[1, :, 2] *= 1e-14  # shorter than the floor of 1e-12
    ours = np.asarray(normalize_columns(jnp.asarray(w, jnp.float32)))
    np.testing.assert_allclose(
        ours, w / np.maximum(np.linalg.norm(w, axis=-2, keepdims=True), 1e-12), atol=1e-6
    )
    gradient = jax.grad(lambda w: normalize_columns(w).sum())(jnp.asarray(w, jnp.float32))
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def untiled():
    return {p: run_head(replace(MODEL, prediction=p), 0) for p in ("velocity", "x0")}


@pytest.mark.parametrize(
    ("tile", "prediction"), [(1, "velocity"), (3, "velocity"), (5, "velocity"), (5, "x0")]
)
def test_tiles_change_nothing(untiled, tile, prediction):
    tiled = run_head(replace(MODEL, prediction=prediction), tile)
    for path, ours in jax.tree_util.tree_leaves_with_path(tiled):
        expected = dict(jax.tree_util.tree_leaves_with_path(untiled[prediction]))[path]
        assert np.abs(expected).max() > 0, path
        np.testing.assert_allclose(
            ours, expected, atol=1e-5 * float(np.abs(expected).max()), err_msg=str(path)
        )


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_a_tile_that_holds_all_is_no_tile(prediction):
    model = replace(MODEL, prediction=prediction)
    whole, same, larger, smaller = (
        lower_head(model, tile, toy_params(model)).as_text() for tile in (0, N, N + 4, N - 1)
    )
    assert whole == same == larger != smaller


def test_patches_do_not_see_each_other_before_the_convolution():
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


def test_gradient_is_finite_when_nothing_is_generated():
    params = toy_params(MODEL)
    blocks = params["head"]["blocks"]
    silent = params | dict(
        head=params["head"]
        | dict(
            blocks=blocks
            | dict(param_generator=jax.tree.map(jnp.zeros_like, blocks["param_generator"]))
        )
    )
    gradient, _ = run_head(MODEL, 3, silent)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.abs(gradient[0]["embedder"]["kernel"]).max() > 0


def test_bfloat16_head_reads_and_paints_in_float32():
    """A change of the image that bfloat16 cannot hold comes through, and so do values that it cannot hold."""
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
    here, there = head(tokens, image), head(tokens, image + 2**-10)
    assert here.dtype == jnp.float32
    assert jnp.bfloat16(0.75) == jnp.bfloat16(0.75 + 2**-10)
    assert np.abs(here - there).max() > 1e-3
    assert (here != here.astype(jnp.bfloat16)).mean() > 0.9
    painted = jax.eval_shape(
        lambda: bind_model(MODEL, compute, params).head.apply_in_chunks(
            tokens, patchify(jnp.asarray(image), MODEL.patch)
        )
    )
    assert painted.dtype == jnp.float32
