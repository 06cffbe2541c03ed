"""Conversions that must be exact are exact to the byte; rounding errors agree with theory."""

import json
import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from radiance import config
from radiance.base.errors import CheckpointError, OutputError
from radiance.weights import native, rounding
from radiance.weights.checkpoint import Checkpoint, open_checkpoint
from radiance.weights.conversion_report import find_network_part
from radiance.weights.convert import WRITERS, convert_checkpoint
from radiance.weights.detect import MARKERS
from radiance.weights.formats import EXPORT_FORMATS
from radiance.weights.opening import open_tensors
from radiance.weights.surgery import merge_checkpoints
from tests.helpers.toy_files import LATENT, PIXELS, published, save, sentence, stored
from tests.helpers.toy_models import toy_model

SIZES = dict(hidden=64, rope_axes=(4, 14, 14))
X0_PATCH32 = toy_model(
    prediction="x0", patch_embed="conv_half", text_ids="sequential", registers=1, **SIZES
)
FLUX = toy_model(
    head="linear",
    patch=1,
    channels=8,
    modulation="per_block",
    pooled_dim=5,
    guidance_embed=True,
    masking="off",
    **SIZES,
)
TEXT = toy_model(
    patch_embed="bottleneck",
    padding="learned",
    masking="off",
    text_refiner_blocks=2,
    modulation="none",
    head="linear",
    **SIZES,
)
MODELS = {"pixels": PIXELS, "text": TEXT, "x0_patch32": X0_PATCH32, "flux": FLUX, "latent": LATENT}
TYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
WEIGHTS = {"native": "out.safetensors", "diffusers": "out", "gguf": "out.gguf", "torch": "out"}


def write_source(folder, model=PIXELS, dtype="bfloat16"):
    return save(folder / "in.safetensors", published(model, dtype), model)


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("model", "to"),
    [
        (name, to)
        for name in MODELS
        for to in EXPORT_FORMATS
        if to != "diffusers" or name == "latent"
    ],
    ids=lambda x: x,
)
def test_converting_there_and_back_gives_the_same_file(model, to, dtype, tmp_path):
    source = write_source(tmp_path, MODELS[model], dtype)
    target, back = tmp_path / WEIGHTS[to], tmp_path / "back.safetensors"
    report = convert_checkpoint(open_checkpoint(source), target, to)
    converted = open_checkpoint(target)
    assert converted.model == MODELS[model]
    assert converted.metadata["radiance.origin"] == str(source)
    convert_checkpoint(converted, back)
    if to == "gguf":  # vectors and kernels are float32 there, which changes no value
        types = {name: x.dtype for name, x in load_file(source).items()}
        save(back, {name: x.astype(types[name]) for name, x in load_file(back).items()})
    assert stored(back) == stored(source)
    assert str(report).count("exact") == len(report.rows)
    assert "e-" not in str(report)


def test_a_file_may_be_converted_onto_itself(tmp_path):
    source = write_source(tmp_path)
    convert_checkpoint(open_checkpoint(source), source, dtype="float32")
    assert {x.dtype.name for x in load_file(source).values()} == {"float32"}
    assert open_checkpoint(source).model == PIXELS


@pytest.mark.parametrize("to", ["native", "gguf"])
@pytest.mark.parametrize("has_markers", [True, False])
def test_markers_can_be_left_out(to, has_markers, tmp_path):
    """They are empty, as in the published files; our own metadata describe the variant too."""
    path = tmp_path / WEIGHTS[to]
    source = open_checkpoint(write_source(tmp_path, X0_PATCH32))
    convert_checkpoint(source, path, to, has_markers=has_markers)
    shapes = {name: shape for name, shape in open_tensors(path).shapes.items() if name in MARKERS}
    assert shapes == (dict.fromkeys(MARKERS, (0,)) if has_markers else {})
    converted = open_checkpoint(path)
    assert converted.model == X0_PATCH32
    convert_checkpoint(converted, tmp_path / "again.safetensors")  # writes them again
    assert set(MARKERS) <= set(open_tensors(tmp_path / "again.safetensors").shapes)


def test_the_torch_programs_need_the_markers(tmp_path):
    source = open_checkpoint(write_source(tmp_path, X0_PATCH32))
    with pytest.raises(CheckpointError, match="PyTorch programs") as error:
        convert_checkpoint(source, tmp_path / "out", "torch", has_markers=False)
    sentence(error)


def test_the_gguf_package_reads_every_tensor_exactly(tmp_path):
    tensors = published(X0_PATCH32)
    convert_checkpoint(
        open_checkpoint(save(tmp_path / "in.safetensors", tensors, X0_PATCH32)),
        tmp_path / "out.gguf",
    )
    converted = {
        x.name: gguf.quants.dequantize(x.data, x.tensor_type)
        for x in gguf.GGUFReader(tmp_path / "out.gguf").tensors
        if x.n_elements
    }
    assert set(converted) == {name for name, x in tensors.items() if x.size}
    for name, x in converted.items():
        np.testing.assert_array_equal(
            x.reshape(tensors[name].shape), tensors[name].astype(np.float32)
        )


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q6_K"])
def test_quantized_gguf_tensors_are_copied(type_name, tmp_path):
    """No quantizer makes these blocks, so they would change on the way through float32."""
    ggml_type = gguf.GGMLQuantizationType[type_name]
    block, size = gguf.GGML_QUANT_SIZES[ggml_type]
    model = toy_model(hidden=256, rope_axes=(16, 56, 56))
    tensors, rng = published(model), np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "flux")
    writer.add_string("radiance.model", json.dumps(config.to_dict(model)))
    rows = {}
    for name, x in tensors.items():
        if native.is_quantizable(name):
            blocks = rng.integers(0, 256, (*x.shape[:-1], x.shape[-1] // block, size), np.uint8)
            blocks[..., -2 if type_name == "Q6_K" else 0 :][..., :2] = np.frombuffer(
                np.float16(1e-3).tobytes(), np.uint8
            )
            rows[name] = blocks.reshape(len(x), -1)
            writer.add_tensor(name, rows[name], raw_dtype=ggml_type)
        else:
            writer.add_tensor(name, x.astype(np.float32))
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    for options in ({}, {"dtype": type_name.lower()}) if type_name != "Q6_K" else ({},):
        report = convert_checkpoint(
            open_checkpoint(tmp_path / "in.gguf"), tmp_path / "out.gguf", **options
        )
        converted = {x.name: x for x in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
        for name, data in rows.items():
            assert converted[name].tensor_type == ggml_type
            np.testing.assert_array_equal(converted[name].data, data)
        assert all("exact" in line for line in str(report).splitlines() if type_name in line)


def test_quantized_gguf_tensors_become_bfloat16_in_other_formats(tmp_path):
    convert_checkpoint(open_checkpoint(write_source(tmp_path)), tmp_path / "q8.gguf", dtype="q8_0")
    convert_checkpoint(open_checkpoint(tmp_path / "q8.gguf"), tmp_path / "out.safetensors")
    assert set(open_checkpoint(tmp_path / "out.safetensors").dtypes.values()) == {"F32", "BF16"}


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (dtype, scales)
        for dtype in ("int8", "float8_e4m3fn", "float8_e5m2")
        for scales in (None, "one", "rows")
        if scales or dtype != "int8"
    ],
)
def test_quantized_safetensors_are_copied(dtype, scales, tmp_path):
    tensors = published(PIXELS)
    for name in filter(native.is_quantizable, list(tensors)):
        x = tensors[name].astype(np.float32)
        scale = (
            np.float32(0.01)
            * np.arange(1, 1 + (len(x) if scales == "rows" else 1), dtype=np.float32)
            if scales
            else np.ones(1, np.float32)
        )
        quantized = x / scale[:, None]
        tensors[name] = (
            np.rint(quantized).clip(-127, 127).astype(np.int8)
            if dtype == "int8"
            else quantized.astype(TYPES[dtype])
        )
        if scales:
            tensors[name.replace(".weight", ".weight_scale")] = (
                scale[:, None] if scales == "rows" else scale.reshape(())
            )
    source = save(tmp_path / "in.safetensors", tensors, PIXELS)
    for options in {}, {"dtype": dtype}:
        report = convert_checkpoint(
            open_checkpoint(source), tmp_path / "out.safetensors", **options
        )
        converted, expected = read_raw(tmp_path / "out.safetensors"), read_raw(source)
        descriptions = {name for name in converted if name.endswith(".comfy_quant")}
        assert {name: x for name, x in converted.items() if name not in descriptions} == expected
        assert len(descriptions) == sum(name.endswith("_scale") for name in expected)
        assert str(report).count("exact") == len(report.rows)
    # Values become bfloat16 in formats without scales or without the type.
    convert_checkpoint(open_checkpoint(source), tmp_path / "out", "torch")
    convert_checkpoint(open_checkpoint(source), tmp_path / "out.gguf")
    for name in ("out", "out.gguf"):
        dtypes = set(open_checkpoint(tmp_path / name).dtypes.values())
        assert dtypes == {"F32", "BF16"} | (
            {STORED_DTYPES[dtype]} if name == "out" and not scales else set()
        )


def read_raw(path):
    """Return types, shapes and bytes, also of types that NumPy does not have."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entries = {
        name: entry for name, entry in json.loads(data[8:begin]).items() if name != "__metadata__"
    }
    return {
        name: (x["dtype"], x["shape"], data[begin:][slice(*x["data_offsets"])])
        for name, x in entries.items()
    }


STORED_DTYPES = {"int8": "I8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def test_tensors_that_were_changed_are_not_copied(tmp_path):
    convert_checkpoint(
        open_checkpoint(write_source(tmp_path)), tmp_path / "fp8.safetensors", dtype="float8_e4m3fn"
    )
    converted = open_checkpoint(tmp_path / "fp8.safetensors")
    changed = merge_checkpoints(
        converted,
        open_checkpoint(save(tmp_path / "b.safetensors", published(PIXELS, seed=1), PIXELS)),
        0.5,
    )
    convert_checkpoint(changed, tmp_path / "out.safetensors")
    assert (
        open_checkpoint(tmp_path / "out.safetensors").dtypes["single_blocks.0.linear1.weight"]
        == "BF16"
    )


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [("gguf", None), ("gguf", "q8_0"), ("safetensors", None), ("safetensors", "int8")],
)
def test_damaged_scales_are_rejected(ending, dtype, tmp_path):
    path, name = tmp_path / f"in.{ending}", "single_blocks.2.linear2.weight"
    convert_checkpoint(
        open_checkpoint(write_source(tmp_path)), path, dtype="q8_0" if ending == "gguf" else "int8"
    )
    file = open_tensors(path)
    location = file.locations[name] if ending == "gguf" else file._scale_locations[name]
    with path.open("r+b") as out:
        out.seek(location.offset)
        out.write(b"\xff" * (2 if ending == "gguf" else 4))
    with pytest.raises(CheckpointError, match=f"{name} holds values that are not finite") as error:
        convert_checkpoint(open_checkpoint(path), tmp_path / f"out.{ending}", dtype=dtype)
    sentence(error)
    assert not (tmp_path / f"out.{ending}").exists()


def test_rounding_needs_little_memory(tmp_path):
    """A weight needs 2 bytes each when read, made and written, and chunks are float32."""
    model = toy_model(
        hidden=768,
        heads=2,
        rope_axes=(128, 128, 128),
        double_blocks=1,
        single_blocks=1,
        nerf_hidden=64,
        nerf_mlp_ratio=4,
        nerf_depth=1,
    )
    shapes = native.native_layout(model)[0]
    noise = np.random.default_rng(0).standard_normal(1 << 16, np.float32).astype(TYPES["bfloat16"])
    checkpoint = Checkpoint(
        model,
        shapes,
        lambda name: np.resize(noise, shapes[name]),
        dict.fromkeys(shapes, "BF16"),
        "noise",
    )
    largest = max(math.prod(shape) for shape in shapes.values())
    assert largest == 768 * 3 * 64 * 256
    tracemalloc.start()
    convert_checkpoint(checkpoint, tmp_path / "out.safetensors", dtype="float16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 * largest


# --- rounding -------------------------------------------------------------------------------------


def uniform_error(step, values) -> float:
    """Return the relative RMS error of values distributed uniformly between two steps."""
    return float(np.sqrt(np.mean(np.square(step)) / 12) / np.sqrt(np.mean(np.square(values))))


def float_steps(values, mantissa: int, least: int):
    """Return the distances to the next float, for normal and (below 2**least) subnormal values."""
    return np.exp2(np.maximum(np.floor(np.log2(np.abs(values))), least) - mantissa)


THEORY = {
    "bfloat16": lambda blocks: uniform_error(float_steps(blocks, 7, -126), blocks),
    "float16": lambda blocks: uniform_error(float_steps(blocks, 10, -14), blocks),
    "float8_e4m3fn": lambda blocks: uniform_error(float_steps(blocks, 3, -6), blocks),
    "q8_0": lambda blocks: uniform_error(np.abs(blocks).max(axis=-1) / 127, blocks),
    "q4_0": lambda blocks: uniform_error(np.abs(blocks).max(axis=-1) / 8, blocks),
}


@pytest.mark.parametrize("dtype", ["float16", "int8", "q8_0"])
def test_rounding_in_threads_gives_the_same(dtype, monkeypatch):
    values = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    name, is_gguf = "double_blocks.0.img_mlp.0.weight", dtype == "q8_0"
    expected = rounding.round_tensor(values, dtype, name, is_gguf)
    monkeypatch.setattr(rounding, "CHUNK_SIZE", 256)
    with ThreadPoolExecutor(4) as pool:
        result = rounding.round_tensor(values, dtype, name, is_gguf, pool.map)
    assert result.values.tobytes() == expected.values.tobytes()
    assert (result.scales is None) == (expected.scales is None)
    if expected.scales is not None:
        np.testing.assert_array_equal(result.scales, expected.scales)
    assert result.sum_squares == pytest.approx(expected.sum_squares)
    assert result.sum_squared_errors == pytest.approx(expected.sum_squared_errors)


@pytest.mark.parametrize("dtype", THEORY)
def test_rounding_errors_agree_with_theory(dtype, tmp_path):
    """The reported errors are the measured ones."""
    tensors = published(LATENT, "float32")
    source = save(tmp_path / "in.safetensors", tensors, LATENT)
    path = tmp_path / ("out.gguf" if dtype.startswith("q") else "out.safetensors")
    report = convert_checkpoint(
        open_checkpoint(source), path, "gguf" if dtype.startswith("q") else "native", dtype
    )
    names = [name for name in tensors if native.is_quantizable(name)]
    blocks = np.concatenate([tensors[name].reshape(-1, 32) for name in names])
    converted = open_checkpoint(path)
    error = (
        np.concatenate(
            [converted.get_tensor(name).astype(np.float32).reshape(-1, 32) for name in names]
        )
        - blocks
    )
    measured = float(np.linalg.norm(error) / np.linalg.norm(blocks))
    # 4 bits have one more value on one side of zero: half of the largest values are clipped.
    assert measured == pytest.approx(THEORY[dtype](blocks), rel=0.15 if dtype == "q4_0" else 0.03)
    rows = [
        line
        for line in report.rows.values()
        if line.part in ("double blocks", "single blocks") and line.target_dtype == dtype
    ]
    reported = np.sqrt(sum(x.sum_squared_errors for x in rows) / sum(x.sum_squares for x in rows))
    assert reported == pytest.approx(measured, rel=0.02)  # which includes the blocks' vectors
    print(f"{dtype}: relative rms error {measured:.2e}, in theory {THEORY[dtype](blocks):.2e}")


def test_int8_errors_agree_with_theory(tmp_path):
    tensors = published(LATENT, "float32")
    source, path = save(tmp_path / "in.safetensors", tensors, LATENT), tmp_path / "out.safetensors"
    report = convert_checkpoint(open_checkpoint(source), path, dtype="int8")
    matrices = {name: x for name, x in tensors.items() if native.is_quantizable(name)}
    converted, file = open_checkpoint(path), load_file(path)
    errors = sum(
        np.square(converted.get_tensor(name) - x).sum(dtype=np.float64)
        for name, x in matrices.items()
    )
    squares = sum(np.square(x).sum(dtype=np.float64) for x in matrices.values())
    theory = sum(
        x.shape[1] * np.square(np.abs(x).max(axis=1) / 127).sum() / 12 for x in matrices.values()
    )
    assert errors == pytest.approx(theory, rel=0.05)
    rows = [line for line in report.rows.values() if line.target_dtype == "int8"]
    assert np.sqrt(
        sum(x.sum_squared_errors for x in rows) / sum(x.sum_squares for x in rows)
    ) == pytest.approx(np.sqrt(errors / squares), rel=1e-4)
    assert sum(x.num_bytes for x in rows) == sum(x.size + 4 * len(x) for x in matrices.values())
    # As in files of other tools: values, a scale per row, and ComfyUI's description.
    for name, x in matrices.items():
        scale, description = (
            file[name.replace(".weight", end)] for end in (".weight_scale", ".comfy_quant")
        )
        assert (file[name].dtype, scale.shape, scale.dtype) == (np.int8, (len(x), 1), np.float32)
        assert json.loads(description.tobytes()) == {"format": "int8_tensorwise"}
        assert np.abs(file[name]).max(axis=1).tolist() == [127] * len(x)
        np.testing.assert_array_equal(converted.get_tensor(name), file[name] * scale)
    assert len(file) == len(tensors) + 2 * len(matrices)


# Types in quantized files; None stands for the quantized type.
PRECISE = {
    "__x0__": "float32",
    "nerf_image_embedder.embedder.0.weight": "float32",
    "img_in_patch.weight": "bfloat16",
    "txt_in.weight": "bfloat16",
    "distilled_guidance_layer.layers.0.in_layer.weight": "bfloat16",
    "nerf_blocks.0.param_generator.weight": "bfloat16",
    "nerf_final_layer_conv.conv.weight": "bfloat16",
    "double_blocks.0.img_attn.qkv.weight": None,
    "double_blocks.1.txt_mlp.2.weight": None,
    "single_blocks.2.linear2.weight": None,
}


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "float8_e4m3fn", "int8"])
def test_sensitive_tensors_are_not_quantized(dtype, tmp_path):
    path = tmp_path / ("out.gguf" if dtype.startswith("q") else "out.safetensors")
    convert_checkpoint(
        open_checkpoint(write_source(tmp_path, X0_PATCH32)),
        path,
        "gguf" if dtype.startswith("q") else "native",
        dtype,
    )
    converted = open_checkpoint(path).dtypes
    names = {
        "float32": "F32",
        "bfloat16": "BF16",
        "q8_0": "Q8_0",
        "q4_0": "Q4_0",
        "float8_e4m3fn": "F8_E4M3",
        "int8": "I8",
    }
    # Readers of GGUF expect float32 vectors and convolution kernels.
    vectors = "F32" if dtype.startswith("q") else "BF16"
    kernels = dict.fromkeys(["img_in_patch.weight", "nerf_final_layer_conv.conv.weight"], vectors)
    expected = {name: names[dtype_name or dtype] for name, dtype_name in PRECISE.items()}
    assert {name: converted[name] for name in PRECISE} == expected | kernels
    assert (
        converted["double_blocks.0.img_attn.qkv.bias"]
        == converted["single_blocks.0.norm.query_norm.scale"]
        == vectors
    )
    quantized_names = {name for name, dtype_name in converted.items() if dtype_name == names[dtype]}
    assert quantized_names == {name for name in converted if native.is_quantizable(name)}


def test_a_matrix_that_blocks_do_not_divide_is_not_quantized(tmp_path):
    model = toy_model(hidden=48)  # the MLP has 192
    convert_checkpoint(
        open_checkpoint(write_source(tmp_path, model)), tmp_path / "out.gguf", "gguf", "q8_0"
    )
    converted = open_checkpoint(tmp_path / "out.gguf").dtypes
    assert converted["double_blocks.0.img_mlp.0.weight"] == "BF16"
    assert converted["double_blocks.0.img_mlp.2.weight"] == "Q8_0"


# --- reports and errors ---------------------------------------------------------------------------


def test_the_report_counts_all_tensors(tmp_path):
    progress = []
    report = convert_checkpoint(
        open_checkpoint(write_source(tmp_path)),
        tmp_path / "out.safetensors",
        dtype="float8_e4m3fn",
        on_progress=progress.append,
    )
    file = open_tensors(tmp_path / "out.safetensors")
    tensors = {name: file[name] for name in file.shapes}
    assert (
        sum(progress)
        == sum(x.num_params for x in report.rows.values())
        == sum(x.size for x in tensors.values())
    )
    assert sum(x.num_tensors for x in report.rows.values()) == len(tensors)
    assert sum(x.num_bytes for x in report.rows.values()) == sum(x.nbytes for x in tensors.values())
    table = str(report).splitlines()
    assert table[0].split() == [
        "part",
        "from",
        "to",
        "tensors",
        "parameters",
        "size",
        "rms",
        "error",
    ]
    assert len(table) == 1 + len(report.rows)
    assert any(
        line.startswith("double blocks  BF16  float8_e4m3fn") and line.endswith("e-02")
        for line in table
    )


def test_every_tensor_belongs_to_a_part():
    assert (
        find_network_part("double_blocks.3.img_mod.lin.weight")
        == find_network_part("distilled_guidance_layer.norms.0.scale")
        == "modulation"
    )
    assert (
        find_network_part("txt_in.bias"),
        find_network_part("nerf_blocks.0.norm.scale"),
        find_network_part("__x0__"),
    ) == ("input", "NeRF head", "markers")
    assert (
        find_network_part("text_blocks.0.txt_mlp.0.bias"),
        find_network_part("txt_padding"),
        find_network_part("img_in_bottleneck.in_layer.weight"),
    ) == (
        "text blocks",
        "input",
        "input",
    )


@pytest.mark.parametrize(
    ("to", "dtype", "message"),
    [
        ("onnx", None, "'onnx'.*native, diffusers, gguf, torch"),
        ("native", "int3", "'int3'.*q4_0"),
        ("native", "q8_0", "type of GGUF files"),
        ("gguf", "float8_e4m3fn", "q8_0"),
        ("gguf", "int8", "q8_0"),
        ("torch", "int8", "--to native"),
        ("diffusers", None, "diffusers"),
    ],
)
def test_impossible_exports_are_rejected(to, dtype, message, tmp_path):
    source = open_checkpoint(write_source(tmp_path))
    with pytest.raises(CheckpointError, match=message) as error:
        convert_checkpoint(source, tmp_path / "out", to, dtype)
    sentence(error)
    assert [x.name for x in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(padding="learned"), "padding=learned .only encoder"),
        (dict(text_refiner_blocks=1), "text_refiner_blocks=1 .only 0"),
    ],
)
def test_diffusers_does_not_support_our_text_settings(changes, message, tmp_path):
    model = replace(LATENT, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        convert_checkpoint(
            open_checkpoint(write_source(tmp_path, model)), tmp_path / "out", "diffusers"
        )
    sentence(error)


def test_every_format_has_a_writer():
    assert tuple(WRITERS) == EXPORT_FORMATS


@pytest.mark.parametrize("to", EXPORT_FORMATS)
def test_a_damaged_value_leaves_no_file(to, tmp_path):
    tensors = published(LATENT, "float32")
    tensors["single_blocks.2.linear1.weight"][3, 5] = np.nan  # among the last
    source = open_checkpoint(save(tmp_path / "in.safetensors", tensors, LATENT))
    with pytest.raises(
        CheckpointError, match=r"single_blocks.2.linear1.weight holds values that are not finite"
    ) as error:
        convert_checkpoint(source, tmp_path / WEIGHTS[to], to)
    sentence(error)
    assert [x.name for x in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    source = open_checkpoint(write_source(tmp_path, LATENT))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    for to in ("torch", "diffusers"):
        with pytest.raises(OutputError, match="exists already") as error:
            convert_checkpoint(source, tmp_path / "out", to)
        sentence(error)
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "out" / "thesis.tex").unlink()
    convert_checkpoint(source, tmp_path / "out", "torch")  # an empty folder may exist
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.py",
        "model.safetensors",
        "sample.py",
    ]
    assert config.from_json(config.Model, (tmp_path / "out" / "config.json").read_text()) == LATENT
    assert sorted(x.name for x in tmp_path.iterdir()) == ["in.safetensors", "out"]


def test_the_config_of_diffusers_is_written(tmp_path):
    convert_checkpoint(
        open_checkpoint(write_source(tmp_path, LATENT)), tmp_path / "out", "diffusers"
    )
    diffusers_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert diffusers_config["_class_name"] == "ChromaTransformer2DModel"
    assert diffusers_config["num_layers"] == 2
    assert diffusers_config["axes_dims_rope"] == [4, 14, 14]
