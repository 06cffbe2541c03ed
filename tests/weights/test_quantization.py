"""Notes about quantized weights are followed, or the file is rejected, wherever they are."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from radiance.base.errors import CheckpointError
from radiance.text.t5_weights import T5Weights
from radiance.weights.autoencoder import read_autoencoder
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.inspect import inspect_file
from radiance.weights.opening import open_tensors
from radiance.weights.quantization import HEADER_KEY, rotate_inputs
from tests.helpers.toy_files import KNOWN, PIXELS, published, save, sentence
from tests.helpers.toy_quantized import MATRICES, make_rotation, write_int8
from tests.helpers.toy_t5 import torch_tensors

CASES = Path(__file__).parent / "cases"
INT8 = {"format": "int8_tensorwise"}
MATRIX = "single_blocks.0.linear1.weight"
LAYER = MATRIX.removesuffix(".weight")


def assert_rejected(path, match):
    with pytest.raises(CheckpointError, match=match) as error:
        open_checkpoint(path, **KNOWN)
    assert len(sentence(error)) < 400
    assert "not supported" in inspect_file(path).splitlines()[0]


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_rotations_are_kronecker_powers(size):
    weight = np.random.default_rng(size).standard_normal((3, 512)).astype(np.float32)
    expected = (weight.reshape(3, -1, size) @ make_rotation(size)).reshape(weight.shape)
    np.testing.assert_allclose(rotate_inputs(weight, size), expected, atol=1e-6)
    np.testing.assert_allclose(rotate_inputs(rotate_inputs(weight, size), size), weight, atol=1e-6)


@pytest.mark.parametrize("home", ["header", "tensor", "both"])
@pytest.mark.parametrize(
    "description",
    [
        INT8 | {"convrot": True, "convrot_groupsize": 16},
        INT8 | {"params": {"convrot": True, "convrot_groupsize": 16}},
        INT8 | {"convrot": True, "convrot_groupsize": 16, "per_row": True, "orig_dtype": "bf16"},
    ],
    ids=["settings", "params", "neutral settings"],
)
def test_rotated_weights_are_rotated_back(description, home, tmp_path):
    path = write_int8(tmp_path / "x.safetensors", description, home, rotation_size=16)
    checkpoint = open_checkpoint(path, **KNOWN)
    for name in MATRICES:
        exact = published(PIXELS)[name].astype(np.float32)
        error = np.abs(checkpoint.get_tensor(name) - exact).max() / np.abs(exact).max()
        assert error < 0.02, name
    assert checkpoint.weight_format(MATRIX) is None  # cannot stay as it is
    convert_checkpoint(checkpoint, tmp_path / "out.safetensors")
    converted = open_checkpoint(tmp_path / "out.safetensors")
    assert converted.dtypes[MATRIX] == "BF16"
    np.testing.assert_allclose(
        converted.get_tensor(MATRIX).astype(np.float32), checkpoint.get_tensor(MATRIX), rtol=5e-3
    )


def test_a_file_with_rotations_in_its_header_is_rotated_back(tmp_path):
    """The first file for which this went wrong; its base has the same weights without rotation."""
    path = CASES / "convrot_in_header.safetensors"
    rotated, file = open_checkpoint(path), open_tensors(path)
    for name in ("single_blocks.0.linear1.weight", "single_blocks.0.linear2.weight"):
        plain = file.read_values(file.locations[name]) * file.read_quantized(name).scales
        groups = plain.reshape(len(plain), -1, 64)
        expected = (groups @ make_rotation(64)).reshape(plain.shape)
        np.testing.assert_allclose(rotated.get_tensor(name), expected, atol=1e-5)


@pytest.mark.parametrize("home", ["header", "tensor"])
@pytest.mark.parametrize(
    ("description", "match"),
    [
        ({"format": "nvfp4"}, "'nvfp4'"),
        ({"format": "mxfp8"}, "'mxfp8'"),
        ({"format": "asym_w4a8_int8", "convrot": True}, "'asym_w4a8_int8'"),
        ({"format": "int8_blockwise", "group_size": 128}, "'int8_blockwise'"),
        ({"format": ["int8_tensorwise"]}, "the format"),
        ({}, "the format None"),
        (INT8 | {"group_size": 64}, "group_size=64"),
        (INT8 | {"num_experts": 4}, "num_experts=4"),
        (INT8 | {"convrot": True, "convrot_groupsize": 32}, "rotates 32 inputs"),
        (INT8 | {"convrot": True, "convrot_groupsize": "x"}, "rotates 'x' inputs"),
        (INT8 | {"convrot": True}, "rotates 256 inputs"),  # which do not divide 64
        (INT8 | {"orig_shape": [64, 32]}, "shape"),
        ({"format": "float8_e4m3fn"}, "describes .* as F8_E4M3"),
        ("int8_tensorwise", "describes|format"),
    ],
)
def test_descriptions_that_are_not_known_are_rejected(description, match, home, tmp_path):
    assert_rejected(write_int8(tmp_path / "x.safetensors", description, home), match)


@pytest.mark.parametrize("description", [INT8, INT8 | {"convrot": False}, INT8 | {"params": {}}])
@pytest.mark.parametrize("home", ["header", "tensor", "both"])
def test_plain_int8_is_read(description, home, tmp_path):
    path = write_int8(tmp_path / "x.safetensors", description, home)
    assert open_checkpoint(path, **KNOWN).weight_format(MATRIX) == "int8"


@pytest.mark.parametrize(
    ("prefix", "layer_prefix"),
    [("model.diffusion_model.", None), ("", "model.diffusion_model."), ("diffusion_model.", "")],
)
def test_names_in_the_header_may_have_another_prefix(prefix, layer_prefix, tmp_path):
    path = write_int8(
        tmp_path / "x.safetensors",
        INT8 | {"convrot": True, "convrot_groupsize": 16},
        "header",
        16,
        prefix,
        layer_prefix,
    )
    if (prefix, layer_prefix) == ("diffusion_model.", ""):
        assert_rejected(path, "which it does not contain")
    else:
        assert open_checkpoint(path, **KNOWN).weight_format(MATRIX) is None


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({HEADER_KEY: "{"}, "not JSON"),
        ({HEADER_KEY: "[" * 100_000}, "not JSON"),
        ({HEADER_KEY: "[]"}, "not JSON"),
        ({HEADER_KEY: "{}"}, "without layers"),
        ({HEADER_KEY: '{"layers": {"nothing": {"format": "int8_tensorwise"}}}'}, "nothing"),
        ({"quantization_hadamard": "true"}, "quantization_hadamard='true'"),
        ({"quantization": "nvfp4"}, "quantization='nvfp4'"),
        ({"modelspec.quantization": "svdq-int4"}, "svdq-int4"),
        ({"quant_format": "int8_convrot"}, "int8_convrot"),
        ({"convrot_groupsize": "256"}, "convrot_groupsize='256'"),
    ],
)
def test_headers_that_are_not_known_are_rejected(metadata, match, tmp_path):
    save_file(published(PIXELS), tmp_path / "x.safetensors", metadata)
    assert_rejected(tmp_path / "x.safetensors", match)


def test_headers_that_say_nothing_are_read(tmp_path):
    metadata = {"quantization": "None", "quant_method": "fp8", "ss_base_quantization": "nf4"}
    save_file(published(PIXELS), tmp_path / "x.safetensors", metadata)
    assert open_checkpoint(tmp_path / "x.safetensors", **KNOWN)


def test_two_descriptions_that_differ_are_rejected(tmp_path):
    path = write_int8(tmp_path / "x.safetensors", INT8, "both")
    tensors = {name: x for name, x in read_all(path).items()}
    rotated = {f"{LAYER}": INT8 | {"convrot": True, "convrot_groupsize": 16}}
    save_file(tensors, path, {HEADER_KEY: json.dumps({"layers": rotated})})
    assert_rejected(path, "differently")


def read_all(path):
    from safetensors.numpy import load_file

    return load_file(path)


def test_every_file_of_an_index_describes_its_own_layers(tmp_path):
    """The header of one file must not replace that of another."""
    path = write_int8(
        tmp_path / "x.safetensors", INT8 | {"convrot": True, "convrot_groupsize": 16}, "header", 16
    )
    tensors, weight_map = read_all(path), {}
    path.unlink()
    for part, kind in enumerate(("double", "single", "")):
        chosen = {
            name: x
            for name, x in tensors.items()
            if name not in weight_map and name.startswith(kind)
        }
        weight_map |= dict.fromkeys(chosen, f"{part}.safetensors")
        layers = {
            name.removesuffix(".weight"): INT8 | {"convrot": True, "convrot_groupsize": 16}
            for name in MATRICES
            if name in chosen
        }
        save_file(
            chosen, tmp_path / f"{part}.safetensors", {HEADER_KEY: json.dumps({"layers": layers})}
        )
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(index, **KNOWN)
    assert all(checkpoint.weight_format(name) is None for name in MATRICES)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_])
def test_integers_without_scales_are_rejected(dtype, tmp_path):
    tensors = published(PIXELS) | {MATRIX: np.ones(published(PIXELS)[MATRIX].shape, dtype)}
    path = save(tmp_path / "x.safetensors", tensors, PIXELS)
    with pytest.raises(CheckpointError, match=f"{MATRIX} as integers .* no scales") as error:
        open_checkpoint(path)
    sentence(error)
    assert "no scales" in inspect_file(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_other_integers_with_scales_are_rejected(dtype, tmp_path):
    """Files store float8 as bytes, and four-bit values packed."""
    tensors = published(PIXELS) | {MATRIX: np.ones(published(PIXELS)[MATRIX].shape, dtype)}
    tensors[f"{LAYER}.weight_scale"] = np.ones(1, np.float32)
    path = save(tmp_path / "x.safetensors", tensors, PIXELS)
    with pytest.raises(CheckpointError, match="are packed") as error:
        open_checkpoint(path)
    sentence(error)


def test_integers_in_text_encoders_and_autoencoders_are_rejected(tmp_path):
    t5 = torch_tensors()
    name = next(name for name in t5 if name.endswith("SelfAttention.q.weight"))
    save_file(t5 | {name: t5[name].astype(np.int8)}, tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match="no scales") as error:
        T5Weights(tmp_path / "t5.safetensors")
    sentence(error)


@pytest.mark.parametrize(
    ("shape", "dtype", "is_read"),
    [
        ((), np.float32, True),
        ((1, 1), np.float32, True),
        ((8,), ml_dtypes.bfloat16, True),
        ((8, 1), np.float16, True),
        ((1, 8), np.float32, False),  # of inputs
        ((8, 2), np.float32, False),
        ((8, 1), np.uint8, False),  # exponents of MXFP8
        ((8, 1), ml_dtypes.float8_e4m3fn, False),
    ],
)
def test_scales_are_of_the_weight_or_its_rows(shape, dtype, is_read, tmp_path):
    tensors = {"x.weight": np.ones((8, 8), np.int8), "x.weight_scale": np.ones(shape, dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    if is_read:
        assert open_tensors(tmp_path / "x.safetensors")["x.weight"].dtype == np.float32
    else:
        with pytest.raises(CheckpointError, match=r"x\.weight_scale of shape") as error:
            open_tensors(tmp_path / "x.safetensors")
        sentence(error)


UNSUPPORTED = {
    "bitsandbytes": {"weight.absmax": np.uint8, "weight.quant_state.bitsandbytes__nf4": np.uint8},
    "quanto": {"weight._data": np.int8, "weight._scale": np.float32, "input_scale": np.float32},
    "SVDQuant": {"qweight": np.int8, "wscales": np.float32, "smooth": np.float32},
    "GPTQ": {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32},
    "AWQ": {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16},
    "NVFP4": {"weight": np.uint8, "weight_scale": np.uint8, "weight_scale_2": np.float32},
    "HQQ": {"W_q": np.uint8, "meta": np.uint8},
    "torchao": {"_weight_qdata": np.int8, "_weight_scale": np.float32},
    "compressed-tensors": {"weight_packed": np.int32, "weight_scale": np.float32},
    "scales of blocks": {"weight": np.int8, "weight_scale_inv": np.float32},
    "SDNQ": {"weight": np.uint8, "scale": np.float32, "zero_point": np.float32},
    "MLX": {"weight": np.uint32, "scales": np.float16, "biases": np.float16},
    "not known": {"weight": np.int8, "weight_scales": np.float32},
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
@pytest.mark.parametrize("reader", [open_checkpoint, T5Weights, read_autoencoder])
def test_other_formats_are_named(kind, reader, tmp_path):
    """They have hundreds of tensors that a list in the error would name."""
    tensors = published(PIXELS)
    for name in MATRICES:
        del tensors[name]
        layer = name.removesuffix(".weight")
        tensors |= {
            f"{layer}.{suffix}": np.ones((8, 8), t) for suffix, t in UNSUPPORTED[kind].items()
        }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=kind) as error:
        reader(tmp_path / "x.safetensors")
    assert len(sentence(error)) < 300
    description = inspect_file(tmp_path / "x.safetensors")
    assert kind in description.splitlines()[0]
    assert "total" in description


def test_svdquant_is_no_lora():
    assert "SVDQuant" in inspect_file(CASES / "svdq.safetensors").splitlines()[0]


def test_the_config_of_diffusers_may_describe_a_quantization(tmp_path):
    from tests.helpers.toy_files import LATENT

    source = open_checkpoint(save(tmp_path / "x.safetensors", published(LATENT), LATENT))
    convert_checkpoint(source, tmp_path / "out", "diffusers")
    config_path = tmp_path / "out" / "config.json"
    settings = json.loads(config_path.read_text())
    settings["quantization_config"] = {"quant_method": "torchao"}
    config_path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="quantization_config") as error:
        open_checkpoint(tmp_path / "out")
    sentence(error)
