"""Changed checkpoints give the outputs they must; tensors that do not change are bit-exact."""

from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from radiance.base.errors import CheckpointError
from radiance.cli import main
from radiance.model.transformer import bind_modulation
from radiance.weights import native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.opening import open_tensors
from radiance.weights.surgery import (
    convert_head_to_conv,
    dilate_patches,
    fix_pooled_vector,
    graft,
    merge_checkpoints,
)
from tests.helpers.toy_files import LATENT, PIXELS, published, save, sentence
from tests.helpers.toy_models import FLOAT32, apply, toy_inputs, toy_model


def make_checkpoint(folder, model=PIXELS, seed=0):
    return open_checkpoint(
        save(folder / f"{seed}.safetensors", published(model, "float32", seed), model)
    )


def compute_output(checkpoint, inputs):
    return np.asarray(apply(checkpoint.model, checkpoint.load_params(), inputs))


def write_and_open(checkpoint, folder):
    """Return the checkpoint as read from a file, which identifies its model."""
    convert_checkpoint(checkpoint, folder / "result.safetensors")
    result = open_checkpoint(folder / "result.safetensors")
    assert result.model == checkpoint.model
    return result


def test_graft_combines_trunk_and_new_head(tmp_path):
    trunk, pixels = (
        make_checkpoint(tmp_path, LATENT),
        toy_model(prediction="x0", hidden=64, rope_axes=(4, 14, 14), nerf_depth=3),
    )
    grafted = write_and_open(graft(trunk, pixels, seed=1), tmp_path)
    assert (
        grafted.model.patch,
        grafted.model.head,
        grafted.model.prediction,
        grafted.model.nerf_depth,
    ) == (
        4,
        "nerf_conv",
        "x0",
        3,
    )
    unchanged = [name for name in grafted.shapes if name in trunk.shapes]
    assert len(unchanged) == len(trunk.shapes) - 4  # without the two latent layers
    for name in unchanged:
        np.testing.assert_array_equal(grafted.get_tensor(name), trunk.get_tensor(name))
    inputs = toy_inputs(grafted.model)
    # A new head predicts zeros: x̂ = 0, and the velocity is the image over time.
    np.testing.assert_allclose(
        compute_output(grafted, inputs),
        inputs["image"] / inputs["time"][:, None, None, None],
        rtol=1e-6,
    )
    again, other = graft(trunk, pixels, seed=1), graft(trunk, pixels, seed=2)
    name = "img_in_patch.weight"
    np.testing.assert_array_equal(again.get_tensor(name), grafted.get_tensor(name))
    assert (other.get_tensor(name) != grafted.get_tensor(name)).mean() > 0.99
    assert "grafted" in other.origin


def test_graft_needs_a_pixel_model(tmp_path):
    with pytest.raises(CheckpointError, match="pixel model") as error:
        graft(make_checkpoint(tmp_path), LATENT)
    sentence(error)


def test_dilated_model_gives_the_same_tokens_without_detail(tmp_path):
    model = toy_model(hidden=64, rope_axes=(4, 14, 14), head="nerf_linear")
    small = make_checkpoint(tmp_path, model)
    large = write_and_open(dilate_patches(small), tmp_path)
    assert (large.model.patch, large.model.patch_embed) == (8, "conv")
    rng = np.random.default_rng(2)
    patch = rng.standard_normal((3, 4, 4))
    expected, tokens = (
        np.einsum("ochw,chw->o", checkpoint.get_tensor("img_in_patch.weight"), x)
        for checkpoint, x in ((small, patch), (large, patch.repeat(2, axis=1).repeat(2, axis=2)))
    )
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)
    unchanged = [name for name in small.shapes if name != "img_in_patch.weight"]
    assert set(large.shapes) == set(small.shapes)
    for name in unchanged:
        np.testing.assert_array_equal(large.get_tensor(name), small.get_tensor(name))


def test_dilated_model_can_read_every_second_pixel(tmp_path):
    small = make_checkpoint(tmp_path)
    large = write_and_open(dilate_patches(small, "conv_half"), tmp_path)
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
def test_model_that_cannot_be_dilated_is_an_error(changes, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be dilated.*patch=") as error:
        dilate_patches(
            make_checkpoint(tmp_path, toy_model(hidden=64, rope_axes=(4, 14, 14), **changes))
        )
    sentence(error)


def test_convolution_gives_the_output_of_the_linear_layer(tmp_path):
    linear = make_checkpoint(
        tmp_path, toy_model(hidden=64, rope_axes=(4, 14, 14), head="nerf_linear")
    )
    conv = write_and_open(convert_head_to_conv(linear), tmp_path)
    assert conv.model.head == "nerf_conv"
    inputs = toy_inputs(linear.model)
    expected = compute_output(linear, inputs)
    np.testing.assert_allclose(
        compute_output(conv, inputs), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    with pytest.raises(CheckpointError, match="only nerf_linear") as error:
        convert_head_to_conv(conv)
    sentence(error)


def test_each_tensor_of_the_convolution_keeps_its_own_type(tmp_path):
    """In GGUF files vectors are float32 beside BF16 matrices, and must not be rounded to these."""
    model = toy_model(hidden=64, rope_axes=(4, 14, 14), head="nerf_linear")
    tensors = published(model, "float32")
    matrix = "nerf_final_layer.linear.weight"
    tensors[matrix] = tensors[matrix].astype(ml_dtypes.bfloat16)
    source = open_checkpoint(save(tmp_path / "x.safetensors", tensors, model))
    conv = write_and_open(convert_head_to_conv(source), tmp_path)
    assert conv.dtypes["nerf_final_layer_conv.conv.weight"] == "BF16"
    for new_name, old_name in (("norm.scale", "norm.scale"), ("conv.bias", "linear.bias")):
        np.testing.assert_array_equal(
            conv.get_tensor(f"nerf_final_layer_conv.{new_name}"),
            tensors[f"nerf_final_layer.{old_name}"],
        )


ROUNDED_ONCE = {
    "merge": lambda x: merge_checkpoints(x, x, 0.3),
    "extrapolate": lambda x: merge_checkpoints(x, x, -1.7),
    "dilate": dilate_patches,
    "head": convert_head_to_conv,
    "graft": lambda x: graft(x, PIXELS),
    "pooled": lambda x: fix_pooled_vector(x, np.linspace(-1, 1, 5, dtype=np.float32), "a line"),
    "two": lambda x: dilate_patches(merge_checkpoints(x, x, 0.3)),
}
ROUNDED_MODELS = {
    "head": dict(head="nerf_linear"),
    "pooled": dict(modulation="per_block", pooled_dim=5, head="linear"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "q8_0"])
@pytest.mark.parametrize("stored", ["bfloat16", "int8", "q8_0"])
@pytest.mark.parametrize("change", ROUNDED_ONCE)
def test_results_are_rounded_once(change, stored, dtype, tmp_path):
    """The type of the source must not round a result on its way to the type of the target."""
    model = toy_model(hidden=64, rope_axes=(4, 14, 14), **ROUNDED_MODELS.get(change, {}))
    suffix = {"q8_0": "gguf"}
    source = tmp_path / f"stored.{suffix.get(stored, 'safetensors')}"
    convert_checkpoint(make_checkpoint(tmp_path, model), source, dtype=stored)
    convert_checkpoint(open_checkpoint(source), tmp_path / "exact.safetensors", dtype="float32")
    results = []
    for path in (source, tmp_path / "exact.safetensors"):
        target = tmp_path / f"{path.stem}-result.{suffix.get(dtype, 'safetensors')}"
        convert_checkpoint(ROUNDED_ONCE[change](open_checkpoint(path)), target, dtype=dtype)
        file = open_tensors(target)
        results.append({name: file[name].tobytes() for name in file.shapes})
    assert results[0] == results[1]


def test_fixed_pooled_vector_gives_the_same_modulation(tmp_path):
    """The command fixes the mean of the vectors of a file; float32 rounding remains."""
    file, out = tmp_path / "0.safetensors", tmp_path / "fixed.safetensors"
    flux = make_checkpoint(
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
    fixed = open_checkpoint(out)
    assert fixed.model == replace(flux.model, pooled_dim=0)
    removed = [name for name in flux.shapes if name.startswith("vector_in.")]
    assert len(removed) == 4
    assert set(fixed.shapes) == set(flux.shapes) - set(removed)
    for name in fixed.shapes:
        assert (fixed.get_tensor(name) != flux.get_tensor(name)).any() == (
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
    vectors = bind_modulation(fixed.model, FLOAT32, fixed.load_params()["modulation"])(
        time, guidance, None
    )
    for x, y in zip(vectors, expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max(initial=1))
    with pytest.raises(CheckpointError, match="reads no pooled text vector") as error:
        fix_pooled_vector(fixed, np.zeros(0), "zero")
    sentence(error)


def test_merge_is_a_weighted_mean(tmp_path):
    a, b = make_checkpoint(tmp_path), make_checkpoint(tmp_path, seed=1)
    for ratio in (0.0, 0.25, 1.0, 1.5):
        merged = merge_checkpoints(a, b, ratio)
        for name in native.native_layout(PIXELS)[1]:
            expected = (1 - ratio) * a.get_tensor(name) + ratio * b.get_tensor(name)
            np.testing.assert_allclose(merged.get_tensor(name), expected, rtol=1e-6, atol=1e-6)
    assert "0.25 of" in merge_checkpoints(a, b, 0.25).origin
    write_and_open(merge_checkpoints(a, b, 0.25), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"different models.*model\.prediction is 'velocity' and 'x0'"
    ) as error:
        merge_checkpoints(
            a,
            make_checkpoint(
                tmp_path, toy_model(hidden=64, rope_axes=(4, 14, 14), prediction="x0"), 2
            ),
            0.5,
        )
    sentence(error)


def test_merged_checkpoint_has_the_types_of_the_first(tmp_path):
    half = open_checkpoint(save(tmp_path / "half.safetensors", published(PIXELS), PIXELS))
    merged = write_and_open(
        merge_checkpoints(half, make_checkpoint(tmp_path, seed=1), 0.5), tmp_path
    )
    assert merged.dtypes["txt_in.weight"] == "BF16"
    assert merged.dtypes["nerf_image_embedder.embedder.0.weight"] == "F32"
