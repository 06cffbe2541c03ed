from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance.base.errors import ConfigError
from radiance.model import autoencoder, tiling
from radiance.model.autoencoder import Autoencoder
from tests.helpers.toy_models import noisy_autoencoder

SIZES = Autoencoder(latent_channels=4, width=8, multipliers=(1, 2), blocks=1, groups=4)
SIDE = SIZES.patch_size


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@partial(jax.jit, static_argnames=("sizes", "dtype", "tile"))
def encoded(sizes, params, images, key, dtype, tile):
    return autoencoder.encode_images(sizes, params, images, key, dtype=dtype, tile=tile)


@partial(jax.jit, static_argnames=("sizes", "dtype", "tile"))
def decoded(sizes, params, latents, dtype, tile):
    return autoencoder.decode_latents(sizes, params, latents, dtype=dtype, tile=tile)


def encode(images, sizes=SIZES, params=None, key=None, dtype="float32", tile=0):
    return encoded(
        sizes, noisy_autoencoder(sizes) if params is None else params, images, key, dtype, tile
    )


def decode(latents, sizes=SIZES, params=None, dtype="float32", tile=0):
    return decoded(
        sizes, noisy_autoencoder(sizes) if params is None else params, latents, dtype, tile
    )


# --- shapes and order ---------------------------------------------------------------------------------------------------


def test_packed_order_and_the_way_back():
    latents = normal(2, 6, 8, 5)
    packed = autoencoder.pack_latents(jnp.asarray(latents))
    assert packed.shape == (2, 3, 4, 20)
    for row in range(6):
        for column in range(8):
            for c in range(5):
                at = packed[:, row // 2, column // 2, c * 4 + (row % 2) * 2 + column % 2]
                np.testing.assert_array_equal(at, latents[:, row, column, c])
    np.testing.assert_array_equal(autoencoder.unpack_latents(packed), latents)


def test_flux_sizes():
    sizes = Autoencoder()
    tree = autoencoder.make_abstract_autoencoder(sizes)
    assert sum(x.size for x in jax.tree.leaves(tree)) == 83_819_683
    assert sizes.patch_size == 16
    assert sizes.widths == (128, 256, 512, 512)
    images = jax.ShapeDtypeStruct((2, 48, 64, 3), jnp.float32)
    latents = jax.eval_shape(
        lambda params, x: autoencoder.encode_images(sizes, params, x), tree, images
    )
    assert latents.shape == (2, 3, 4, 64)
    assert latents.dtype == jnp.float32
    assert (
        jax.eval_shape(
            lambda params, x: autoencoder.decode_latents(sizes, params, x), tree, latents
        )
        == images
    )


def test_fresh_parameters():
    params = autoencoder.init_autoencoder_params(SIZES, jax.random.key(0))
    expected = jax.tree.map(
        lambda x: (x.shape, x.dtype), autoencoder.make_abstract_autoencoder(SIZES)
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == expected
    block = params["decoder"]["levels"][0]["blocks"][0]
    assert 0.8 < np.std(block["conv1"]["kernel"]) * np.sqrt(9 * 16) < 1.2
    assert (block["norm1"]["scale"] == 1).all()
    assert (block["norm1"]["bias"] == 0).all()
    assert (block["conv1"]["bias"] == 0).all()
    assert not np.array_equal(
        block["conv2"]["kernel"], params["encoder"]["levels"][0]["blocks"][0]["conv2"]["kernel"]
    )


def test_either_half_is_enough():
    params, latents = noisy_autoencoder(SIZES), normal(2, 2, 3, 16)
    np.testing.assert_array_equal(
        decode(latents, params={"decoder": params["decoder"]}), decode(latents)
    )
    images = normal(2, 2 * SIDE, 3 * SIDE, 3)
    np.testing.assert_array_equal(
        encode(images, params={"encoder": params["encoder"]}), encode(images)
    )


# --- values -------------------------------------------------------------------------------------------------------------


def test_shift_and_scale():
    plain, images = replace(SIZES, shift=0.0, scale=1.0), normal(2, 2 * SIDE, 3 * SIDE, 3)
    latents = encode(images, sizes=plain)
    assert np.std(latents) > 0.1
    scaled = encode(images)
    np.testing.assert_allclose(scaled, (latents - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(decode(scaled), decode(latents, sizes=plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("log_variance", "deviation"), [(np.log(4), 2), (100, np.exp(10)), (-100, 0)]
)
def test_a_sample_of_the_posterior(log_variance, deviation):
    """Its deviation is that of the second half of the channels, kept between exp(−15) and exp(10)."""
    params = jax.tree.map(np.copy, noisy_autoencoder(SIZES))
    out = params["encoder"]["conv_out"]
    out["kernel"][..., 4:], out["bias"][4:] = 0, log_variance
    images = normal(2, 2 * SIDE, 3 * SIDE, 3)
    mean, one, again, other = (
        encode(images, params=params, key=key) for key in (None, *map(jax.random.key, (1, 1, 2)))
    )
    np.testing.assert_array_equal(one, again)
    assert np.std(one - mean) == pytest.approx(0.3611 * deviation, rel=0.1, abs=1e-6)
    assert np.std(one - other) == pytest.approx(0.3611 * deviation * np.sqrt(2), rel=0.1, abs=1e-6)


def test_the_middle_sees_the_whole_image_and_the_batch_is_apart():
    latents = normal(2, 4, 12, 16)
    changed = latents.copy()
    changed[0, 0, 0] += 3
    difference = np.abs(decode(changed) - decode(latents))
    assert (difference[0, -1, -1] > 1e-5).all()
    assert (difference[1] == 0).all()


def test_gradients_are_finite_and_reach_everything():
    images = normal(2, 2 * SIDE, 3 * SIDE, 3)
    images[0] = 0  # the first norm sees no variance but that of the borders

    def loss(params, images):
        latents = autoencoder.encode_images(
            SIZES, params, images, jax.random.key(0), dtype="float32"
        )
        return jnp.vdot(
            normal(*images.shape, seed=1),
            autoencoder.decode_latents(SIZES, params, latents, dtype="float32"),
        )

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(noisy_autoencoder(SIZES), images)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        if path[-2:] != (
            jax.tree_util.DictKey("key"),
            jax.tree_util.DictKey("bias"),
        ):  # which softmax does not see
            assert np.abs(gradient).max() > 1e-4, path


def test_bfloat16_reads_and_paints_in_float32():
    images, latents = np.full((1, 4 * SIDE, 4 * SIDE, 3), 0.75, np.float32), normal(1, 4, 4, 16)
    assert jnp.bfloat16(0.75) == jnp.bfloat16(0.75 + 2**-10)
    here, there = encode(images, dtype="bfloat16"), encode(images + 2**-10, dtype="bfloat16")
    assert np.abs(here - there).max() > 0
    painted, exact = decode(latents, dtype="bfloat16"), decode(latents)
    assert painted.dtype == here.dtype == jnp.float32
    assert (painted != painted.astype(jnp.bfloat16)).mean() > 0.9
    assert 1e-4 < np.std(painted - exact) / np.std(exact) < 0.03


# --- tiles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [5 * SIDE, 8 * SIDE])
def test_a_tile_that_holds_all_is_no_tile(tile):
    images, latents = normal(2, 3 * SIDE, 5 * SIDE, 3), normal(2, 5, 4, 16)
    np.testing.assert_array_equal(encode(images, tile=tile), encode(images))
    np.testing.assert_array_equal(decode(latents, tile=tile), decode(latents))


@pytest.mark.parametrize("n", [*range(9, 24), 100])
@pytest.mark.parametrize("tile", [4, 7, 8])
def test_tiles_cover_the_axis_with_weights_of_one(n, tile):
    firsts, weights = tiling.place_tiles(n, tile, 3)
    assert firsts[0] == 0
    assert firsts[-1] == n - tile
    assert (np.diff(firsts) > 0).all()
    assert (np.diff(firsts) <= tile - tile // 4).all()
    assert len(firsts) == int(
        np.ceil((n - tile // 4) / (tile - tile // 4))
    )  # no more than are needed
    total = np.zeros(3 * n)
    for first, weight in zip(firsts, weights):
        total[3 * first : 3 * (first + tile)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (weights > 0).all()
    assert (weights[0, : 3 * firsts[1]] == 1).all()
    assert (weights[-1, -3:] == 1).all()
    assert (
        max(weights[1:, 0].max(), weights[:-1, -1].max()) < 0.35
    )  # a tile comes in and goes out slowly


@pytest.mark.parametrize(("rows", "columns"), [(11, 17), (3, 13), (9, 8), (20, 2)])
@pytest.mark.parametrize(("reads", "writes"), [(2, 3), (3, 2)])
def test_what_looks_at_no_neighbours_is_not_changed(rows, columns, reads, writes):
    """A body that is compiled once whatever the number of tiles, and whose parts all have one shape."""
    x, seen = jnp.asarray(normal(2, rows * reads, columns * reads, 4)), []

    def body(x):
        seen.append(x.shape)
        x = x[:, ::reads, ::reads, 1:]  # one place of each token
        return x.repeat(writes, axis=1).repeat(writes, axis=2)

    tiled = tiling.apply_in_tiles(body, x, reads, writes, 3, 8)
    assert set(seen) == {(2, reads * min(rows, 8), reads * min(columns, 8), 4)}
    np.testing.assert_allclose(tiled, body(x), atol=1e-6)


def test_tiles_of_different_brightness_blend_without_seams():
    x = jnp.broadcast_to(jnp.arange(40.0)[:, None, None], (1, 40, 24, 1))
    painted = tiling.apply_in_tiles(lambda part: jnp.full_like(part, part.mean()), x, 1, 1, 1, 16)[
        0, ..., 0
    ]
    assert painted[0, 0] == 7.5
    assert painted[-1, 0] == 31.5
    steps = np.diff(painted, axis=0)
    np.testing.assert_allclose(painted, painted[:, :1].repeat(24, axis=1), atol=1e-5)
    assert (steps > -1e-5).all()
    assert steps.max() < 12 / 4 + 1e-4


LATENTS = {"noise": normal(1, 12, 20, 16), "constant": np.full((1, 12, 20, 16), 0.7, np.float32)}


@pytest.mark.parametrize("latents", LATENTS)
def test_a_tiled_image_is_near_the_whole_one_and_has_no_seams(latents):
    x, tile = LATENTS[latents], 8
    whole, tiled = decode(x)[0], decode(x, tile=tile * SIDE)[0]
    wrong = np.asarray(tiled - whole)
    if latents == "noise":
        assert 0.01 < np.std(wrong) / np.std(whole) < 0.2
    for axis, n in enumerate(x.shape[1:3]):
        firsts, _ = tiling.place_tiles(n, tile, SIDE)
        edges = np.concatenate([firsts[1:], firsts[:-1] + tile]) * SIDE - 1
        steps = np.abs(np.diff(wrong, axis=axis)).mean(axis=(1 - axis, 2))
        assert steps[edges].max() < 2 * steps.mean() + 1e-6


def test_tiles_come_nearer_when_they_grow():
    whole, small, large = (decode(LATENTS["noise"], tile=tile * SIDE) for tile in (0, 8, 16))
    assert np.std(large - whole) < 0.8 * np.std(small - whole)


def test_tiled_latents():
    """They are near the whole image's, and samples keep their variance where tiles overlap."""
    params = jax.tree.map(np.copy, noisy_autoencoder(SIZES))
    out = params["encoder"]["conv_out"]
    out["kernel"][..., 4:], out["bias"][4:] = 0, 0
    images = normal(1, 12 * SIDE, 20 * SIDE, 3)
    whole, mean, sample = (
        encode(images, params=params, key=key, tile=tile)
        for key, tile in ((None, 0), (None, 32), (jax.random.key(0), 32))
    )
    assert 0.01 < np.std(mean - whole) / np.std(whole) < 0.2
    assert np.std(sample - mean) == pytest.approx(0.3611, rel=0.05)


def test_the_tile_bounds_the_memory():
    def workspace(rows, tile):
        params, latents = (
            jax.eval_shape(lambda: noisy_autoencoder(SIZES)),
            jax.ShapeDtypeStruct((1, rows, 8, 16), jnp.float32),
        )
        lowered = jax.jit(
            lambda params, x: autoencoder.decode_latents(
                SIZES, params, x, dtype="float32", tile=tile * SIDE
            )
        ).lower(params, latents)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    image = 64 * 8 * SIDE * SIDE * 3 * 4
    assert workspace(64, 8) < workspace(8, 0) + 6 * image < workspace(64, 0) / 4


# --- wrong input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(2 * SIDE, 2 * SIDE + 1), (SIDE + SIDE // 2, SIDE)])
def test_images_that_do_not_divide(height, width):
    with pytest.raises(
        ValueError,
        match=rf"{width}×{height} does not divide into squares of {SIDE} pixels: pad or crop it first\.",
    ):
        encode(normal(1, height, width, 3))


@pytest.mark.parametrize("tile", [3 * SIDE, 5 * SIDE + 1, -SIDE * 4])
def test_unfit_tiles(tile):
    with pytest.raises(
        ValueError,
        match=rf"tile={tile} must be a multiple of {SIDE} pixels and at least {4 * SIDE}",
    ):
        encode(normal(1, SIDE, SIDE, 3), tile=tile)
    with pytest.raises(ValueError, match=f"tile={tile}"):
        decode(normal(1, 1, 1, 16), tile=tile)


def test_latents_of_another_autoencoder():
    with pytest.raises(
        ValueError, match="latents of 64 channels were given, and this autoencoder has 16"
    ):
        decode(normal(1, 2, 2, 64))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(width=100), "width=100 does not divide into autoencoder.groups=32"),
        (dict(multipliers=(2, 4)), "of which the first is 1"),
        (dict(multipliers=()), "of which the first is 1"),
        (dict(multipliers=(1, 0)), "of which the first is 1"),
        (dict(blocks=0), "blocks is 0"),
        (dict(scale=0.0), "scale=0.0 must be positive"),
    ],
)
def test_sizes_that_cannot_be(changes, told):
    with pytest.raises(ConfigError, match=told):
        Autoencoder(**changes)
