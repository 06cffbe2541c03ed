"""What a file has small stays in memory as it lies there: no value is rounded again."""

import json

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest

from radiance.base.errors import CheckpointError
from radiance.base.trees import flatten_tree
from radiance.model.paths import count_inputs, is_block_matrix
from radiance.model.quantized import QuantizedKernel, quantize
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.gguf import open_gguf
from tests.helpers.toy_files import LATENT, PIXELS, published, save, sentence
from tests.helpers.toy_models import toy_model

NUMBERS = {
    "int8": np.int8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def small(x):
    return isinstance(x, QuantizedKernel)


def scaled(tensors, store, rows, suffix=".weight_scale"):
    """The blocks' matrices as numbers with a scale of all, or one of each row, that is no power of two."""
    out = dict(tensors)
    for name in filter(native.is_quantizable, tensors):
        x = tensors[name].astype(np.float32)
        largest = np.abs(x).max(axis=1, keepdims=True) if rows else np.abs(x).max(keepdims=True)
        scale = largest / np.float32(
            127 if store == "int8" else ml_dtypes.finfo(NUMBERS[store]).max
        )
        whole = np.rint(x / scale) if store == "int8" else x / scale
        out[name] = whole.astype(NUMBERS[store])
        out[name.replace(".weight", suffix)] = scale.ravel() if rows else scale.reshape(())
    return out


def assert_is_the_file(found, store, leaves=None):
    params = _leaves(found.load_params("float32", "file"))
    whole = flatten_tree(found.load_params("float32"))
    kept = {path for path, x in params.items() if small(x)}
    assert kept == {
        path for path in params if is_block_matrix(path) and (leaves is None or leaves(path))
    }
    for path, x in params.items():
        np.testing.assert_array_equal(
            np.asarray(x.dequantize() if small(x) else x), np.asarray(whole[path]), err_msg=path
        )
    assert {str(params[path].values.dtype) for path in kept} == {
        "int8" if store == "q8_0" else store
    }


def _leaves(params):
    return {
        "/".join(key.key for key in path): x
        for path, x in jax.tree_util.tree_flatten_with_path(params, is_leaf=small)[0]
    }


@pytest.mark.parametrize("store", NUMBERS)
@pytest.mark.parametrize("rows", [False, True])
def test_with_scales(store, rows, tmp_path):
    found = open_checkpoint(
        save(tmp_path / "x.safetensors", scaled(published(PIXELS), store, rows), PIXELS)
    )
    assert_is_the_file(found, store)


@pytest.mark.parametrize("store", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_without_scales(store, tmp_path):
    tensors = {
        name: x.astype(NUMBERS[store]) if native.is_quantizable(name) else x
        for name, x in published(PIXELS).items()
    }
    assert_is_the_file(open_checkpoint(save(tmp_path / "x.safetensors", tensors, PIXELS)), store)


def test_q8_0(tmp_path):
    convert_checkpoint(
        open_checkpoint(save(tmp_path / "x.safetensors", published(PIXELS), PIXELS)),
        tmp_path / "x.gguf",
        dtype="q8_0",
    )
    found = open_checkpoint(tmp_path / "x.gguf")
    assert_is_the_file(found, "q8_0")
    # and bit for bit what the values of the file are rounded to
    leaves, whole = (
        _leaves(found.load_params("float32", "file")),
        flatten_tree(found.load_params("float32")),
    )
    for path in filter(is_block_matrix, leaves):
        blocks = np.asarray(whole[path]).reshape(
            len(whole[path]), count_inputs(path, whole[path].shape), -1
        )
        values, scales = zip(*(quantize(block, "q8_0") for block in blocks))
        np.testing.assert_array_equal(leaves[path].values, values)
        np.testing.assert_array_equal(leaves[path].scales, scales)


def test_parts_that_lie_one_below_the_other(tmp_path):
    """diffusers has queries, keys and values apart, each with its scale here."""
    tensors = published(LATENT)
    theirs = {
        t: tensors[n][rows]
        for n in tensors
        for t, (rows, _) in diffusers.locate_diffusers_slices(n, tensors[n].shape, LATENT).items()
    }
    matrices = {
        t for n in filter(native.is_quantizable, tensors) for t in diffusers.to_diffusers_names(n)
    }
    for i, name in enumerate(sorted(matrices)):
        scale = np.float32(0.003 + 0.0001 * i)
        theirs |= {
            name: (theirs[name].astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn),
            name[:-6] + "scale_weight": scale[None],
        }
    found = open_checkpoint(save(tmp_path / "x.safetensors", theirs), rope_axes=LATENT.rope_axes)
    assert found.format == "diffusers"
    assert_is_the_file(found, "float8_e4m3fn")


def test_some_blocks_in_other_types(tmp_path):
    """Their leaf is one array, so these are rounded; as before, and alone."""
    tensors = scaled(published(PIXELS), "int8", rows=True)
    name = "single_blocks.1.linear1.weight"
    tensors[name] = published(PIXELS)[name]
    del tensors[name.replace(".weight", ".weight_scale")]
    found = open_checkpoint(save(tmp_path / "x.safetensors", tensors, PIXELS))
    leaf, whole = (
        _leaves(found.load_params("float32", store))["single/attention/qkv/kernel"]
        for store in ("file", None)
    )
    leaf = np.asarray(leaf.dequantize())
    np.testing.assert_array_equal(leaf[[0, 2]], whole[np.array([0, 2])])
    error = np.abs(leaf[1] - whole[1])
    assert 0 < error.max() <= np.abs(whole[1]).max() / 127 / 2 * 1.01


def test_another_store_than_the_files(tmp_path):
    found = open_checkpoint(
        save(tmp_path / "x.safetensors", scaled(published(PIXELS), "int8", rows=True), PIXELS)
    )
    leaves, whole = (
        _leaves(found.load_params("float32", "q8_0")),
        flatten_tree(found.load_params("float32")),
    )
    path = "double/image/mlp/linear_in/kernel"
    np.testing.assert_array_equal(
        leaves[path].values[1], quantize(np.asarray(whole[path][1]), "q8_0")[0]
    )


def test_leaves_that_blocks_do_not_divide_are_whole(tmp_path):
    """As our own export has them; who asks for q8_0 by name is told."""
    model = toy_model(
        mlp_ratio=80 / 64, hidden=64, rope_axes=(4, 14, 14)
    )  # 80 inputs of an MLP's way back, and 144 of linear2
    convert_checkpoint(
        open_checkpoint(save(tmp_path / "x.safetensors", published(model), model)),
        tmp_path / "x.gguf",
        dtype="q8_0",
    )
    found = open_checkpoint(tmp_path / "x.gguf")
    odd = ("mlp/linear_out/kernel", "single/attention/proj/kernel")
    assert_is_the_file(found, "q8_0", lambda path: not path.endswith(odd))
    with pytest.raises(CheckpointError, match="80 inputs.*use int8") as error:
        found.load_params(weight_format="q8_0")
    sentence(error)


def test_a_matrix_whose_blocks_lie_across_its_parts(tmp_path):
    """linear2 of 48 + 80 inputs is Q8_0 in the file, and neither part of it can be."""
    model = toy_model(mlp_ratio=80 / 48)
    convert_checkpoint(
        open_checkpoint(save(tmp_path / "x.safetensors", published(model), model)),
        tmp_path / "x.gguf",
        dtype="q8_0",
    )
    found = open_checkpoint(tmp_path / "x.gguf")
    assert found.dtypes["single_blocks.0.linear2.weight"] == "Q8_0"
    leaves, whole = (
        _leaves(found.load_params("float32", "file")),
        flatten_tree(found.load_params("float32")),
    )
    assert not any(map(small, leaves.values()))
    np.testing.assert_array_equal(
        leaves["single/attention/proj/kernel"], whole["single/attention/proj/kernel"]
    )


@pytest.mark.parametrize("where", ["values", "scales", "huge"])
def test_values_that_are_not_finite(where, tmp_path):
    tensors = scaled(published(PIXELS), "float8_e4m3fn", rows=True)
    name = "single_blocks.2.linear2.weight"
    if where == "values":
        tensors[name][3, 5] = np.nan
    else:
        tensors[name.replace(".weight", ".weight_scale")][7] = np.nan if where == "scales" else 1e38
    found = open_checkpoint(save(tmp_path / "x.safetensors", tensors, PIXELS))
    with pytest.raises(
        CheckpointError, match="single_blocks.2.linear2.weight holds values that are not finite"
    ) as error:
        found.load_params(weight_format="file")
    sentence(error)


def test_int8_without_scales_is_no_store(tmp_path):
    tensors = {
        name: x
        for name, x in scaled(published(PIXELS), "int8", True).items()
        if not name.endswith("_scale")
    }
    found = open_checkpoint(save(tmp_path / "x.safetensors", tensors, PIXELS))
    assert not any(map(small, _leaves(found.load_params(weight_format="file")).values()))


@pytest.mark.parametrize(
    ("mark", "good"),
    [
        ({"format": "int8_tensorwise"}, True),
        ({"format": "int8_tensorwise", "convrot": True}, False),
    ],
)
def test_rotated_weights_are_refused(mark, good, tmp_path):
    """They look like any others, and would be read as noise."""
    tensors = scaled(published(PIXELS), "int8", rows=True)
    tensors["single_blocks.0.linear1.comfy_quant"] = np.frombuffer(
        json.dumps(mark).encode(), np.uint8
    )
    path = save(tmp_path / "x.safetensors", tensors, PIXELS)
    if good:
        assert open_checkpoint(path).model == PIXELS
    else:
        with pytest.raises(
            CheckpointError, match="single_blocks.0.linear1.weight rotated"
        ) as error:
            open_checkpoint(path)
        sentence(error)


def test_folded_axes_are_no_store(tmp_path):
    """ComfyUI-GGUF may have other axes in the file, and blocks across the rows."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    rows = gguf.quants.quantize(np.ones((3, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("x.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_array("comfy.gguf.orig_shape.x.weight", [6, 16])
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    found = open_gguf(tmp_path / "x.gguf")
    assert found.shapes == {"x.weight": (6, 16)}
    assert found.weight_format("x.weight") is None
    assert found["x.weight"].shape == (6, 16)
