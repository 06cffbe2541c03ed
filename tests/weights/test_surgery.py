"""One checkpoint made of another: what must paint the same image does, and what is not touched is the same to the bit."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from radiance.base.errors import CheckpointError
from radiance.cli import main
from radiance.model.transformer import bind_modulation
from radiance.weights import native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.surgery import (
    convert_head_to_conv,
    dilate_patches,
    fix_pooled_vector,
    graft,
    merge_checkpoints,
)
from tests.helpers.toy_files import LATENT, PIXELS, published, save, sentence
from tests.helpers.toy_models import FLOAT32, apply, toy_inputs, toy_model


def checkpoint_of(folder, model=PIXELS, seed=0):
    return open_checkpoint(
        save(folder / f"{seed}.safetensors", published(model, "float32", seed), model)
    )


def output(checkpoint, inputs):
    return np.asarray(apply(checkpoint.model, checkpoint.load_params(), inputs))


def saved_and_opened(checkpoint, folder):
    """As a user has it: the file says what it is."""
    convert_checkpoint(checkpoint, folder / "made.safetensors")
    found = open_checkpoint(folder / "made.safetensors")
    assert found.model == checkpoint.model
    return found


def test_graft(tmp_path):
    trunk, pixels = (
        checkpoint_of(tmp_path, LATENT),
        toy_model(prediction="x0", hidden=64, rope_axes=(4, 14, 14), nerf_depth=3),
    )
    made = saved_and_opened(graft(trunk, pixels, seed=1), tmp_path)
    assert (made.model.patch, made.model.head, made.model.prediction, made.model.nerf_depth) == (
        4,
        "nerf_conv",
        "x0",
        3,
    )
    kept = [name for name in made.shapes if name in trunk.shapes]
    assert len(kept) == len(trunk.shapes) - 4  # but the latent's own two layers
    for name in kept:
        np.testing.assert_array_equal(made.get_tensor(name), trunk.get_tensor(name))
    inputs = toy_inputs(made.model)
    # A fresh head paints nothing: x̂ = 0, and the velocity is the image over time.
    np.testing.assert_allclose(
        output(made, inputs), inputs["image"] / inputs["time"][:, None, None, None], rtol=1e-6
    )
    again, other = graft(trunk, pixels, seed=1), graft(trunk, pixels, seed=2)
    name = "img_in_patch.weight"
    np.testing.assert_array_equal(again.get_tensor(name), made.get_tensor(name))
    assert (other.get_tensor(name) != made.get_tensor(name)).mean() > 0.99
    assert "grafted" in other.origin


def test_graft_needs_pixels(tmp_path):
    with pytest.raises(CheckpointError, match="pixel model") as error:
        graft(checkpoint_of(tmp_path), LATENT)
    sentence(error)


def test_dilated_reads_the_same_where_there_is_no_detail(tmp_path):
    model = toy_model(hidden=64, rope_axes=(4, 14, 14), head="nerf_linear")
    small = checkpoint_of(tmp_path, model)
    large = saved_and_opened(dilate_patches(small), tmp_path)
    assert (large.model.patch, large.model.patch_embed) == (8, "conv")
    draw = np.random.default_rng(2)
    patch = draw.standard_normal((3, 4, 4))
    expected, tokens = (
        np.einsum("ochw,chw->o", checkpoint.get_tensor("img_in_patch.weight"), x)
        for checkpoint, x in ((small, patch), (large, patch.repeat(2, axis=1).repeat(2, axis=2)))
    )
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)
    kept = [name for name in small.shapes if name != "img_in_patch.weight"]
    assert set(large.shapes) == set(small.shapes)
    for name in kept:
        np.testing.assert_array_equal(large.get_tensor(name), small.get_tensor(name))


def test_dilated_with_every_second_pixel(tmp_path):
    small = checkpoint_of(tmp_path)
    large = saved_and_opened(dilate_patches(small, "conv_half"), tmp_path)
    assert (large.model.patch, large.model.patch_embed) == (
        8,
        "conv_half",
    )
    assert "__32x32__" in large.shapes
    for name in small.shapes:
        np.testing.assert_array_equal(large.get_tensor(name), small.get_tensor(name))


@pytest.mark.parametrize(
    "changes",
    [dict(patch=1, head="linear", channels=8), dict(patch_embed="conv_half"), dict(head="linear")],
)
def test_what_cannot_be_dilated(changes, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be dilated.*patch=") as error:
        dilate_patches(
            checkpoint_of(tmp_path, toy_model(hidden=64, rope_axes=(4, 14, 14), **changes))
        )
    sentence(error)


def test_a_convolution_for_the_linear_head_paints_the_same(tmp_path):
    linear = checkpoint_of(
        tmp_path, toy_model(hidden=64, rope_axes=(4, 14, 14), head="nerf_linear")
    )
    conv = saved_and_opened(convert_head_to_conv(linear), tmp_path)
    assert conv.model.head == "nerf_conv"
    inputs = toy_inputs(linear.model)
    expected = output(linear, inputs)
    np.testing.assert_allclose(
        output(conv, inputs), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    with pytest.raises(CheckpointError, match="only nerf_linear") as error:
        convert_head_to_conv(conv)
    sentence(error)


def test_a_held_pooled_vector_is_one_that_is_given(tmp_path):
    """To the rounding of float32: through the command, at the mean of those in a file, and by itself."""
    file, out = tmp_path / "0.safetensors", tmp_path / "held.safetensors"
    flux = checkpoint_of(
        tmp_path,
        toy_model(
            hidden=64,
            rope_axes=(4, 14, 14),
            modulation="per_block",
            pooled_dim=5,
            guidance_embed=True,
        ),
    )
    vectors = np.random.default_rng(1).standard_normal((7, 5), np.float32)
    save(tmp_path / "pooled.safetensors", {"pooled": vectors})
    assert (
        main(["convert", str(file), str(out), "--pooled", str(tmp_path / "pooled.safetensors")])
        == 0
    )
    held = open_checkpoint(out)
    assert held.model == replace(flux.model, pooled_dim=0)
    gone = [name for name in flux.shapes if name.startswith("vector_in.")]
    assert len(gone) == 4
    assert set(held.shapes) == set(flux.shapes) - set(gone)
    for name in held.shapes:
        assert (held.get_tensor(name) != flux.get_tensor(name)).any() == (
            name == "time_in.out_layer.bias"
        )
    time, guidance, pooled = (
        jnp.float32([0, 0.3, 1]),
        jnp.float32([0, 3, 5]),
        jnp.tile(vectors.mean(axis=0), (3, 1)),
    )
    expected = bind_modulation(flux.model, FLOAT32, flux.load_params()["modulation"])(
        time, guidance, pooled
    )
    found = bind_modulation(held.model, FLOAT32, held.load_params()["modulation"])(
        time, guidance, None
    )
    for x, y in zip(found, expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max(initial=1))
    with pytest.raises(CheckpointError, match="reads no pooled text vector") as error:
        fix_pooled_vector(held, np.zeros(0), "zero")
    sentence(error)


def test_merge(tmp_path):
    a, b = checkpoint_of(tmp_path), checkpoint_of(tmp_path, seed=1)
    for ratio in (0.0, 0.25, 1.0, 1.5):
        made = merge_checkpoints(a, b, ratio)
        for name in native.native_layout(PIXELS)[1]:
            expected = (1 - ratio) * a.get_tensor(name) + ratio * b.get_tensor(name)
            np.testing.assert_allclose(made.get_tensor(name), expected, rtol=1e-6, atol=1e-6)
    assert "0.25 of" in merge_checkpoints(a, b, 0.25).origin
    saved_and_opened(merge_checkpoints(a, b, 0.25), tmp_path)
    with pytest.raises(
        CheckpointError, match="different models.*model.prediction is 'velocity' and 'x0'"
    ) as error:
        merge_checkpoints(
            a,
            checkpoint_of(
                tmp_path, toy_model(hidden=64, rope_axes=(4, 14, 14), prediction="x0"), 2
            ),
            0.5,
        )
    sentence(error)


def test_merged_types_are_the_first_ones(tmp_path):
    half = open_checkpoint(save(tmp_path / "half.safetensors", published(PIXELS), PIXELS))
    found = saved_and_opened(
        merge_checkpoints(half, checkpoint_of(tmp_path, seed=1), 0.5), tmp_path
    )
    assert found.dtypes["txt_in.weight"] == "BF16"
    assert found.dtypes["nerf_image_embedder.embedder.0.weight"] == "F32"
