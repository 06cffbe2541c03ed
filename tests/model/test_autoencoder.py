"""The autoencoder: order, statistics, tiles, gradients, and errors."""

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
PATCH = SIZES.patch_size


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@partial(jax.jit, static_argnames=("sizes", "dtype", "tile"))
def encode_jitted(sizes, params, images, key, dtype, tile):
    return autoencoder.encode_images(sizes, params, images, key, dtype=dtype, tile=tile)


@partial(jax.jit, static_argnames=("sizes", "dtype", "tile"))
def decode_jitted(sizes, params, latents, dtype, tile):
    return autoencoder.decode_latents(sizes, params, latents, dtype=dtype, tile=tile)


def encode(images, sizes=SIZES, params=None, key=None, dtype="float32", tile=0):
    return encode_jitted(
        sizes, noisy_autoencoder(sizes) if params is None else params, images, key, dtype, tile
    )


def decode(latents, sizes=SIZES, params=None, dtype="float32", tile=0):
    return decode_jitted(
        sizes, noisy_autoencoder(sizes) if params is None else params, latents, dtype, tile
    )


# --- shapes and order -----------------------------------------------------------------------------


def test_packing_is_channel_major_and_invertible():
    latents = normal(2, 6, 8, 5)
    packed = autoencoder.pack_latents(jnp.asarray(latents))
    assert packed.shape == (2, 3, 4, 20)
    for row in range(6):
        for column in range(8):
            for c in range(5):
                at = packed[:, row // 2, column // 2, c * 4 + (row % 2) * 2 + column % 2]
                np.testing.assert_array_equal(at, latents[:, row, column, c])
    np.testing.assert_array_equal(autoencoder.unpack_latents(packed), latents)


def test_default_sizes_are_those_of_flux():
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


def test_initial_parameters():
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


def test_encoder_and_decoder_work_alone():
    params, latents = noisy_autoencoder(SIZES), normal(2, 2, 3, 16)
    np.testing.assert_array_equal(
        decode(latents, params={"decoder": params["decoder"]}), decode(latents)
    )
    images = normal(2, 2 * PATCH, 3 * PATCH, 3)
    np.testing.assert_array_equal(
        encode(images, params={"encoder": params["encoder"]}), encode(images)
    )


# --- values ---------------------------------------------------------------------------------------


def test_latents_are_shifted_and_scaled():
    plain, images = replace(SIZES, shift=0.0, scale=1.0), normal(2, 2 * PATCH, 3 * PATCH, 3)
    latents = encode(images, sizes=plain)
    assert np.std(latents) > 0.1
    scaled = encode(images)
    np.testing.assert_allclose(scaled, (latents - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(decode(scaled), decode(latents, sizes=plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("log_variance", "deviation"), [(np.log(4), 2), (100, np.exp(10)), (-100, 0)]
)
def test_samples_have_the_posteriors_standard_deviation(log_variance, deviation):
    """It comes from the second half of the channels, between exp(−15) and exp(10)."""
    params = jax.tree.map(np.copy, noisy_autoencoder(SIZES))
    out = params["encoder"]["conv_out"]
    out["kernel"][..., 4:], out["bias"][4:] = 0, log_variance
    images = normal(2, 2 * PATCH, 3 * PATCH, 3)
    mean, one, again, other = (
        encode(images, params=params, key=key) for key in (None, *map(jax.random.key, (1, 1, 2)))
    )
    np.testing.assert_array_equal(one, again)
    assert np.std(one - mean) == pytest.approx(0.3611 * deviation, rel=0.1, abs=1e-6)
    assert np.std(one - other) == pytest.approx(0.3611 * deviation * np.sqrt(2), rel=0.1, abs=1e-6)


def test_attention_covers_the_image_and_not_the_batch():
    latents = normal(2, 4, 12, 16)
    changed = latents.copy()
    changed[0, 0, 0] += 3
    difference = np.abs(decode(changed) - decode(latents))
    assert (difference[0, -1, -1] > 1e-5).all()
    assert (difference[1] == 0).all()


def test_gradients_are_finite_and_reach_all_parameters():
    images = normal(2, 2 * PATCH, 3 * PATCH, 3)
    images[0] = 0  # the first norm sees variance at the borders alone

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
        ):  # softmax does not depend on it
            assert np.abs(gradient).max() > 1e-4, path


def test_bfloat16_networks_read_and_predict_float32_pixels():
    images, latents = np.full((1, 4 * PATCH, 4 * PATCH, 3), 0.75, np.float32), normal(1, 4, 4, 16)
    assert jnp.bfloat16(0.75) == jnp.bfloat16(0.75 + 2**-10)
    here, there = encode(images, dtype="bfloat16"), encode(images + 2**-10, dtype="bfloat16")
    assert np.abs(here - there).max() > 0
    output, exact = decode(latents, dtype="bfloat16"), decode(latents)
    assert output.dtype == here.dtype == jnp.float32
    assert (output != output.astype(jnp.bfloat16)).mean() > 0.9
    assert 1e-4 < np.std(output - exact) / np.std(exact) < 0.03


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [5 * PATCH, 8 * PATCH])
def test_a_tile_of_the_complete_image_changes_nothing(tile):
    images, latents = normal(2, 3 * PATCH, 5 * PATCH, 3), normal(2, 5, 4, 16)
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
    assert len(firsts) == int(np.ceil((n - tile // 4) / (tile - tile // 4)))  # as few as possible
    total = np.zeros(3 * n)
    for first, weight in zip(firsts, weights):
        total[3 * first : 3 * (first + tile)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (weights > 0).all()
    assert (weights[0, : 3 * firsts[1]] == 1).all()
    assert (weights[-1, -3:] == 1).all()
    assert max(weights[1:, 0].max(), weights[:-1, -1].max()) < 0.35  # weights rise and fall slowly


@pytest.mark.parametrize(("rows", "columns"), [(11, 17), (3, 13), (9, 8), (20, 2)])
@pytest.mark.parametrize(("reads", "writes"), [(2, 3), (3, 2)])
def test_tiles_do_not_change_a_network_without_context(rows, columns, reads, writes):
    """The network is traced once for any number of tiles, which all have one shape."""
    x, seen = jnp.asarray(normal(2, rows * reads, columns * reads, 4)), []

    def network(x):
        seen.append(x.shape)
        x = x[:, ::reads, ::reads, 1:]  # one value of each token
        return x.repeat(writes, axis=1).repeat(writes, axis=2)

    tiled = tiling.apply_in_tiles(network, x, reads, writes, 3, 8)
    assert set(seen) == {(2, reads * min(rows, 8), reads * min(columns, 8), 4)}
    np.testing.assert_allclose(tiled, network(x), atol=1e-6)


def test_tiles_of_different_brightness_blend_without_seams():
    x = jnp.broadcast_to(jnp.arange(40.0)[:, None, None], (1, 40, 24, 1))
    output = tiling.apply_in_tiles(lambda part: jnp.full_like(part, part.mean()), x, 1, 1, 1, 16)[
        0, ..., 0
    ]
    assert output[0, 0] == 7.5
    assert output[-1, 0] == 31.5
    steps = np.diff(output, axis=0)
    np.testing.assert_allclose(output, output[:, :1].repeat(24, axis=1), atol=1e-5)
    assert (steps > -1e-5).all()
    assert steps.max() < 12 / 4 + 1e-4


LATENTS = {"noise": normal(1, 12, 20, 16), "constant": np.full((1, 12, 20, 16), 0.7, np.float32)}


@pytest.mark.parametrize("latents", LATENTS)
def test_a_tiled_image_is_near_the_untiled_one_without_seams(latents):
    x, tile = LATENTS[latents], 8
    whole, tiled = decode(x)[0], decode(x, tile=tile * PATCH)[0]
    wrong = np.asarray(tiled - whole)
    if latents == "noise":
        assert 0.01 < np.std(wrong) / np.std(whole) < 0.2
    for axis, n in enumerate(x.shape[1:3]):
        firsts, _ = tiling.place_tiles(n, tile, PATCH)
        edges = np.concatenate([firsts[1:], firsts[:-1] + tile]) * PATCH - 1
        steps = np.abs(np.diff(wrong, axis=axis)).mean(axis=(1 - axis, 2))
        assert steps[edges].max() < 2 * steps.mean() + 1e-6


def test_larger_tiles_have_smaller_errors():
    whole, small, large = (decode(LATENTS["noise"], tile=tile * PATCH) for tile in (0, 8, 16))
    assert np.std(large - whole) < 0.8 * np.std(small - whole)


def test_tiled_latents_are_near_the_untiled_ones():
    """Samples keep their variance where tiles overlap."""
    params = jax.tree.map(np.copy, noisy_autoencoder(SIZES))
    out = params["encoder"]["conv_out"]
    out["kernel"][..., 4:], out["bias"][4:] = 0, 0
    images = normal(1, 12 * PATCH, 20 * PATCH, 3)
    whole, mean, sample = (
        encode(images, params=params, key=key, tile=tile)
        for key, tile in ((None, 0), (None, 32), (jax.random.key(0), 32))
    )
    assert 0.01 < np.std(mean - whole) / np.std(whole) < 0.2
    assert np.std(sample - mean) == pytest.approx(0.3611, rel=0.05)


def test_tiles_bound_the_memory():
    def workspace(rows, tile):
        params, latents = (
            jax.eval_shape(lambda: noisy_autoencoder(SIZES)),
            jax.ShapeDtypeStruct((1, rows, 8, 16), jnp.float32),
        )
        lowered = jax.jit(
            lambda params, x: autoencoder.decode_latents(
                SIZES, params, x, dtype="float32", tile=tile * PATCH
            )
        ).lower(params, latents)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    image = 64 * 8 * PATCH * PATCH * 3 * 4
    assert workspace(64, 8) < workspace(8, 0) + 6 * image < workspace(64, 0) / 4


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"), [(2 * PATCH, 2 * PATCH + 1), (PATCH + PATCH // 2, PATCH)]
)
def test_images_that_do_not_divide_into_patches_are_an_error(height, width):
    with pytest.raises(
        ValueError,
        match=rf"{width}×{height} does not divide into squares of {PATCH} pixels: pad or crop it",
    ):
        encode(normal(1, height, width, 3))


@pytest.mark.parametrize("tile", [3 * PATCH, 5 * PATCH + 1, -PATCH * 4])
def test_wrong_tile_sizes_are_an_error(tile):
    with pytest.raises(
        ValueError,
        match=rf"tile={tile} must be a multiple of {PATCH} pixels and at least {4 * PATCH}",
    ):
        encode(normal(1, PATCH, PATCH, 3), tile=tile)
    with pytest.raises(ValueError, match=f"tile={tile}"):
        decode(normal(1, 1, 1, 16), tile=tile)


def test_latents_with_other_channels_are_an_error():
    with pytest.raises(ValueError, match="latents have 64 channels, and this autoencoder has 16"):
        decode(normal(1, 2, 2, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(width=100), "width=100 does not divide into autoencoder.groups=32"),
        (dict(multipliers=(2, 4)), "that begin with 1"),
        (dict(multipliers=()), "that begin with 1"),
        (dict(multipliers=(1, 0)), "that begin with 1"),
        (dict(blocks=0), "blocks is 0"),
        (dict(scale=0.0), "scale=0.0 must be positive"),
    ],
)
def test_wrong_sizes_are_an_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        Autoencoder(**changes)
