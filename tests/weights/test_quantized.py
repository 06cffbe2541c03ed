"""Quantized matrices stay in memory exactly as the file stores them."""

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest

from radiance.base.errors import CheckpointError
from radiance.base.trees import flatten_tree
from radiance.model.paths import count_inputs, is_block_matrix
from radiance.model.quantized import QuantizedKernel, quantize_matrix
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.gguf import open_gguf
from tests.helpers.toy_files import LATENT, PIXELS, published, save, sentence
from tests.helpers.toy_models import toy_model

VALUE_DTYPES = {
    "int8": np.int8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def is_quantized(x):
    return isinstance(x, QuantizedKernel)


def quantize_matrices(tensors, weight_format, rows, suffix=".weight_scale"):
    """Return tensors with quantized blocks: one scale, or one per row, no power of two."""
    quantized = dict(tensors)
    for name in filter(native.is_quantizable, tensors):
        x = tensors[name].astype(np.float32)
        largest = np.abs(x).max(axis=1, keepdims=True) if rows else np.abs(x).max(keepdims=True)
        scale = largest / np.float32(
            127 if weight_format == "int8" else ml_dtypes.finfo(VALUE_DTYPES[weight_format]).max
        )
        exact = np.rint(x / scale) if weight_format == "int8" else x / scale
        quantized[name] = exact.astype(VALUE_DTYPES[weight_format])
        quantized[name.replace(".weight", suffix)] = scale.ravel() if rows else scale.reshape(())
    return quantized


def assert_as_stored(checkpoint, weight_format, is_expected=None):
    params = flatten_params(checkpoint.load_params("float32", "file"))
    exact = flatten_tree(checkpoint.load_params("float32"))
    quantized_paths = {path for path, x in params.items() if is_quantized(x)}
    assert quantized_paths == {
        path
        for path in params
        if is_block_matrix(path) and (is_expected is None or is_expected(path))
    }
    for path, x in params.items():
        np.testing.assert_array_equal(
            np.asarray(x.dequantize() if is_quantized(x) else x),
            np.asarray(exact[path]),
            err_msg=path,
        )
    assert {str(params[path].values.dtype) for path in quantized_paths} == {
        "int8" if weight_format == "q8_0" else weight_format
    }


def flatten_params(params):
    return {
        "/".join(key.key for key in path): x
        for path, x in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
    }


@pytest.mark.parametrize("weight_format", VALUE_DTYPES)
@pytest.mark.parametrize("rows", [False, True])
def test_matrices_with_scales_stay_as_stored(weight_format, rows, tmp_path):
    checkpoint = open_checkpoint(
        save(
            tmp_path / "x.safetensors",
            quantize_matrices(published(PIXELS), weight_format, rows),
            PIXELS,
        )
    )
    assert_as_stored(checkpoint, weight_format)


@pytest.mark.parametrize("weight_format", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_without_scales_stays_as_stored(weight_format, tmp_path):
    tensors = {
        name: x.astype(VALUE_DTYPES[weight_format]) if native.is_quantizable(name) else x
        for name, x in published(PIXELS).items()
    }
    assert_as_stored(
        open_checkpoint(save(tmp_path / "x.safetensors", tensors, PIXELS)), weight_format
    )


def test_q8_0_stays_as_stored(tmp_path):
    convert_checkpoint(
        open_checkpoint(save(tmp_path / "x.safetensors", published(PIXELS), PIXELS)),
        tmp_path / "x.gguf",
        dtype="q8_0",
    )
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert_as_stored(checkpoint, "q8_0")
    # Quantizing the file's values again gives the same bits.
    leaves, exact = (
        flatten_params(checkpoint.load_params("float32", "file")),
        flatten_tree(checkpoint.load_params("float32")),
    )
    for path in filter(is_block_matrix, leaves):
        blocks = np.asarray(exact[path]).reshape(
            len(exact[path]), count_inputs(path, exact[path].shape), -1
        )
        values, scales = zip(*(quantize_matrix(block, "q8_0") for block in blocks))
        np.testing.assert_array_equal(leaves[path].values, values)
        np.testing.assert_array_equal(leaves[path].scales, scales)


def test_concatenated_tensors_stay_as_stored(tmp_path):
    """diffusers stores queries, keys and values separately, here each with a scale."""
    tensors = published(LATENT)
    diffusers_tensors = {
        t: tensors[n][rows]
        for n in tensors
        for t, (rows, _) in diffusers.locate_diffusers_slices(n, tensors[n].shape, LATENT).items()
    }
    matrices = {
        t for n in filter(native.is_quantizable, tensors) for t in diffusers.to_diffusers_names(n)
    }
    for i, name in enumerate(sorted(matrices)):
        scale = np.float32(0.003 + 0.0001 * i)
        diffusers_tensors |= {
            name: (diffusers_tensors[name].astype(np.float32) / scale).astype(
                ml_dtypes.float8_e4m3fn
            ),
            name[:-6] + "scale_weight": scale[None],
        }
    checkpoint = open_checkpoint(
        save(tmp_path / "x.safetensors", diffusers_tensors), rope_axes=LATENT.rope_axes
    )
    assert checkpoint.format == "diffusers"
    assert_as_stored(checkpoint, "float8_e4m3fn")


def test_blocks_of_other_types_are_quantized_alone(tmp_path):
    """A leaf is one array, so all of its blocks must have the same type."""
    tensors = quantize_matrices(published(PIXELS), "int8", rows=True)
    name = "single_blocks.1.linear1.weight"
    tensors[name] = published(PIXELS)[name]
    del tensors[name.replace(".weight", ".weight_scale")]
    checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", tensors, PIXELS))
    leaf, exact = (
        flatten_params(checkpoint.load_params("float32", weight_format))[
            "single/attention/qkv/kernel"
        ]
        for weight_format in ("file", None)
    )
    leaf = np.asarray(leaf.dequantize())
    np.testing.assert_array_equal(leaf[[0, 2]], exact[np.array([0, 2])])
    error = np.abs(leaf[1] - exact[1])
    assert 0 < error.max() <= np.abs(exact[1]).max() / 127 / 2 * 1.01


def test_a_format_other_than_the_file_quantizes_again(tmp_path):
    checkpoint = open_checkpoint(
        save(
            tmp_path / "x.safetensors",
            quantize_matrices(published(PIXELS), "int8", rows=True),
            PIXELS,
        )
    )
    leaves, exact = (
        flatten_params(checkpoint.load_params("float32", "q8_0")),
        flatten_tree(checkpoint.load_params("float32")),
    )
    path = "double/image/mlp/linear_in/kernel"
    np.testing.assert_array_equal(
        leaves[path].values[1], quantize_matrix(np.asarray(exact[path][1]), "q8_0")[0]
    )


def test_leaves_that_blocks_do_not_divide_are_not_quantized(tmp_path):
    """Our export does the same; requesting q8_0 explicitly is an error."""
    model = toy_model(
        mlp_ratio=80 / 64, hidden=64, rope_axes=(4, 14, 14)
    )  # linear_out of the MLP has 80 inputs, and linear2 has 144
    convert_checkpoint(
        open_checkpoint(save(tmp_path / "x.safetensors", published(model), model)),
        tmp_path / "x.gguf",
        dtype="q8_0",
    )
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    odd = ("mlp/linear_out/kernel", "single/attention/proj/kernel")
    assert_as_stored(checkpoint, "q8_0", lambda path: not path.endswith(odd))
    with pytest.raises(CheckpointError, match=r"80 inputs.*use int8") as error:
        checkpoint.load_params(weight_format="q8_0")
    sentence(error)


def test_a_fused_matrix_with_blocks_across_its_parts_is_dequantized(tmp_path):
    """linear2 has 48 + 80 inputs and is Q8_0 in the file; neither part of it can be."""
    model = toy_model(mlp_ratio=80 / 48)
    convert_checkpoint(
        open_checkpoint(save(tmp_path / "x.safetensors", published(model), model)),
        tmp_path / "x.gguf",
        dtype="q8_0",
    )
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.dtypes["single_blocks.0.linear2.weight"] == "Q8_0"
    leaves, exact = (
        flatten_params(checkpoint.load_params("float32", "file")),
        flatten_tree(checkpoint.load_params("float32")),
    )
    assert not any(map(is_quantized, leaves.values()))
    np.testing.assert_array_equal(
        leaves["single/attention/proj/kernel"], exact["single/attention/proj/kernel"]
    )


@pytest.mark.parametrize("where", ["values", "scales", "huge"])
def test_values_that_are_not_finite_are_rejected(where, tmp_path):
    tensors = quantize_matrices(published(PIXELS), "float8_e4m3fn", rows=True)
    name = "single_blocks.2.linear2.weight"
    if where == "values":
        tensors[name][3, 5] = np.nan
    else:
        tensors[name.replace(".weight", ".weight_scale")][7] = np.nan if where == "scales" else 1e38
    checkpoint = open_checkpoint(save(tmp_path / "x.safetensors", tensors, PIXELS))
    with pytest.raises(
        CheckpointError, match=r"single_blocks.2.linear2.weight holds values that are not finite"
    ) as error:
        checkpoint.load_params(weight_format="file")
    sentence(error)


def test_merged_axes_have_no_weight_format(tmp_path):
    """ComfyUI-GGUF may merge axes in the file, so that blocks extend over rows."""
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
    checkpoint = open_gguf(tmp_path / "x.gguf")
    assert checkpoint.shapes == {"x.weight": (6, 16)}
    assert checkpoint.weight_format("x.weight") is None
    assert checkpoint["x.weight"].shape == (6, 16)
