import errno
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest

from radiance.base.errors import CheckpointError, OutputError
from radiance.weights.gguf import (
    UNQUANTIZED_TYPES,
    decode_gguf_values,
    encode_gguf_values,
    open_gguf,
    write_gguf,
)
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import DTYPES, DTYPES_BY_CODE
from tests.helpers.toy_files import sentence

QUANTIZATION_TYPES = gguf.GGMLQuantizationType
QUANTIZED_TYPES = {
    ggml_type: ggml_type.name
    for ggml_type in QUANTIZATION_TYPES
    if ggml_type.value not in UNQUANTIZED_TYPES
}  # quantized types
DEQUANTIZABLE = [
    ggml_type
    for ggml_type in QUANTIZED_TYPES
    if ggml_type in gguf.quants._type_traits and ggml_type.name != "Q1_0"
]


def write_with_package(path, tensors, **metadata):
    """Write a file with the package; tensors are arrays, or (type, bytes of rows)."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, value in metadata.items():
        writer.add_string(key, value)
    for name, x in tensors.items():
        if isinstance(x, tuple):
            writer.add_tensor(name, x[1], raw_dtype=x[0])
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word.encode())) + word.encode()


def info(name="x", shape=(32,), ggml_type=0, offset=0) -> bytes:
    return text(name) + struct.pack(
        f"<I{len(shape)}QIQ", len(shape), *shape[::-1], ggml_type, offset
    )


def write_raw(path, infos=(), pairs=(), data=b"", version=3, counts=None, alignment=32):
    """Write a file byte by byte. `counts` are wrong numbers of tensors and metadata pairs."""
    counts = counts or (len(infos), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(infos)
    path.write_bytes(header + bytes(-len(header) % alignment) + data)
    return path


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ggml_type", DEQUANTIZABLE, ids=lambda ggml_type: ggml_type.name)
def test_every_quantized_type_is_dequantized(ggml_type, tmp_path):
    """Random bytes are blocks of some weights."""
    block, size = gguf.GGML_QUANT_SIZES[ggml_type]
    rows = np.random.default_rng(ggml_type.value).integers(0, 256, (6, 3 * size), np.uint8)
    tensors = open_gguf(
        write_with_package(
            tmp_path / "x.gguf", {"a": np.ones(3, np.float32), "x.weight": (ggml_type, rows)}
        )
    )
    assert tensors.dtypes == {"a": "F32", "x.weight": ggml_type.name}
    assert tensors.shapes["x.weight"] == (
        6,
        3 * block,
    )
    with np.errstate(all="ignore"):
        values = tensors["x.weight"]
        np.testing.assert_array_equal(
            values, gguf.quants.dequantize(rows, ggml_type)
        )  # NaN equals NaN here
    assert values.dtype == np.float32


def test_the_package_dequantizes_the_common_types():
    assert len(DEQUANTIZABLE) >= 22
    assert {"Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"} <= {
        ggml_type.name for ggml_type in DEQUANTIZABLE
    }


@pytest.mark.parametrize(
    "ggml_type",
    [ggml_type for ggml_type in QUANTIZED_TYPES if ggml_type not in DEQUANTIZABLE],
    ids=lambda ggml_type: ggml_type.name,
)
def test_types_that_the_package_cannot_dequantize_are_rejected(ggml_type, tmp_path):
    rows = np.zeros((2, gguf.GGML_QUANT_SIZES[ggml_type][1]), np.uint8)
    tensors = open_gguf(write_with_package(tmp_path / "x.gguf", {"x": (ggml_type, rows)}))
    with pytest.raises(
        CheckpointError, match=f"of type {ggml_type.name}, which the gguf package cannot dequantize"
    ) as error:
        tensors["x"]
    sentence(error)


@pytest.mark.parametrize("ggml_type", UNQUANTIZED_TYPES)
def test_unquantized_types_are_read_as_stored(ggml_type, tmp_path):
    dtype = DTYPES_BY_CODE[UNQUANTIZED_TYPES[ggml_type]]
    values = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    path = write_raw(
        tmp_path / "x.gguf", [info(shape=(3, 4), ggml_type=ggml_type)], data=values.tobytes()
    )
    tensors = open_tensors(path)
    assert tensors["x"].dtype == dtype
    assert tensors.dtypes["x"] == QUANTIZATION_TYPES(ggml_type).name
    np.testing.assert_array_equal(tensors["x"], values)


def test_version_2_and_all_metadata_types_are_read(tmp_path):
    """Only the first items of long arrays are kept; the tensors behind them are still found."""
    pairs = [
        text("words")
        + struct.pack("<IIQ", 9, 8, 100)
        + b"".join(text(f"w{i}") for i in range(100)),
        text("numbers") + struct.pack("<IIQ", 9, 12, 200) + bytes(1600),
        text("name") + struct.pack("<I", 8) + text("zwölf"),
        text("half") + struct.pack("<If", 6, 0.5),
        text("yes") + struct.pack("<I?", 7, True),
        text("general.alignment") + struct.pack("<II", 4, 64),
    ]
    infos = [info("far", (2,), offset=64), info("near", (1, 1)), info("empty", (0,), offset=64)]
    data = np.float32(7).tobytes() + bytes(60) + np.array([1, 2], np.float32).tobytes()
    tensors = open_gguf(write_raw(tmp_path / "x.gguf", infos, pairs, data, version=2, alignment=64))
    assert tensors.metadata == {
        "name": "zwölf",
        "half": "0.5",
        "yes": "True",
        "general.alignment": "64",
    }
    assert tensors["far"].tolist() == [1, 2]
    assert tensors["near"].tolist() == [[7]]
    assert tensors["empty"].shape == (0,)


def test_original_shapes_of_merged_axes_are_restored(tmp_path):
    """ComfyUI's converter merges axes of convolutions and stores the original shape."""
    original = text("comfy.gguf.orig_shape.x") + struct.pack("<IIQ4i", 9, 5, 4, 2, 3, 4, 4)
    values = np.arange(96, dtype=np.float32)
    path = write_raw(tmp_path / "x.gguf", [info(shape=(3, 32))], [original], values.tobytes())
    np.testing.assert_array_equal(open_gguf(path)["x"], values.reshape(2, 3, 4, 4))


# --- damaged files --------------------------------------------------------------------------------

SHAPE = "comfy.gguf.orig_shape.x"
DAMAGED = {
    "version 1": (dict(version=1), "of version 1, but only versions 2 and 3"),
    "big-endian": (dict(version=3 << 24), "little-endian"),
    "endless tensors": (dict(counts=(1 << 60, 0)), "truncated or damaged"),
    "endless metadata": (dict(counts=(0, 1 << 60)), "truncated or damaged"),
    "an endless text": (dict(pairs=[struct.pack("<Q", 1 << 62)]), "truncated or damaged"),
    "an endless array": (
        dict(pairs=[text("a") + struct.pack("<IIQ", 9, 12, 1 << 61)]),
        "truncated or damaged",
    ),
    "an array of arrays": (
        dict(pairs=[text("a") + struct.pack("<IIQ", 9, 9, 1)]),
        r"of an unknown type \(9, 9\)",
    ),
    "metadata of unknown type": (
        dict(pairs=[text("a") + struct.pack("<IIQ", 13, 1, 1)]),
        "of an unknown type",
    ),
    "alignment 0": (
        dict(pairs=[text("general.alignment") + struct.pack("<II", 4, 0)]),
        "alignment of 0",
    ),
    "alignment word": (
        dict(pairs=[text("general.alignment") + struct.pack("<I", 8) + text("a")]),
        "alignment of a",
    ),
    "too many axes": (dict(infos=[text("x") + struct.pack("<I", 9) + bytes(100)]), "of 9 axes"),
    "huge axes": (
        dict(infos=[info(shape=(1 << 63, 1 << 63))]),
        "overlaps another tensor or extends beyond the end",
    ),
    "huge empty axes": (dict(infos=[info(shape=(0, 1 << 63))]), "it is damaged"),
    "beyond the end": (
        dict(infos=[info(shape=(33,))]),
        "x overlaps another tensor or extends beyond the end",
    ),
    "offset beyond the end": (dict(infos=[info(offset=1 << 63)]), "extends beyond the end"),
    "overlap": (dict(infos=[info("a", (20,)), info("b", (4,), offset=64)]), "b overlaps another"),
    "duplicate name": (
        dict(infos=[info("a", (4,)), info("a", (4,), offset=64)]),
        "a overlaps another",
    ),
    "unknown type": (
        dict(infos=[info(ggml_type=99)]),
        r"in a type \(99\) that the gguf package does not know",
    ),
    "removed type": (dict(infos=[info(ggml_type=4)]), r"in a type \(4\)"),
    "part of a block": (
        dict(infos=[info(shape=(31,), ggml_type=8)]),
        r"shape \[31\], which blocks of 32 do not divide",
    ),
    "a block without axes": (
        dict(infos=[info(shape=(), ggml_type=8)]),
        r"shape \[\], which blocks of 32",
    ),
    "original shape": (
        dict(infos=[info()], pairs=[text(SHAPE) + struct.pack("<IIQ2i", 9, 5, 2, 4, 9)]),
        r"the original shape \[4, 9\], which",
    ),
    "negative shape": (
        dict(infos=[info()], pairs=[text(SHAPE) + struct.pack("<IIQ2i", 9, 5, 2, -4, -8)]),
        r"the original shape \[-4, -8\]",
    ),
    "original words": (
        dict(
            infos=[info(shape=(1,))], pairs=[text(SHAPE) + struct.pack("<IIQ", 9, 8, 1) + text("a")]
        ),
        r"shape \['a'\]",
    ),
    "original number": (
        dict(infos=[info()], pairs=[text(SHAPE) + struct.pack("<II", 4, 32)]),
        "the original shape 32",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_rejected(case, tmp_path):
    changes, message = DAMAGED[case]
    path = write_raw(tmp_path / "x.gguf", **({"data": bytes(128)} | changes))
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(path)
    assert str(path) in sentence(error)


def test_a_file_cut_off_anywhere_is_rejected(tmp_path):
    path = write_with_package(
        tmp_path / "x.gguf",
        {"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16)},
        note="yes",
    )
    content = path.read_bytes()
    end = open_gguf(path).locations["b"]
    for length in range(9, end.offset + end.nbytes):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as error:
            open_tensors(path)
        sentence(error)


# --- writing --------------------------------------------------------------------------------------

SHAPES = {
    "__x0__": (0,),
    "one": (1,),
    "bias": (7,),
    "conv": (2, 3, 4, 4),
    "half": (3, 5),
    "bf": (4, 6),
    "q8": (5, 64),
    "q4": (6, 96),
}
TYPES = {
    "__x0__": "float32",
    "one": "float32",
    "bias": "float32",
    "conv": "float32",
    "half": "float16",
    "bf": "bfloat16",
    "q8": "q8_0",
    "q4": "q4_0",
}


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def write(path, values):
    write_gguf(
        path,
        SHAPES,
        TYPES,
        ((name, encode_gguf_values(values[name], TYPES[name], name)) for name in SHAPES),
        {"radiance.note": "zwölf"},
    )
    return path


def test_the_package_reads_the_written_file(values, tmp_path):
    reader = gguf.GGUFReader(write(tmp_path / "new" / "x.gguf", values))
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("general.quantization_version").contents() == gguf.GGML_QUANT_VERSION
    assert reader.get_field("radiance.note").contents() == "zwölf"
    type_names = {
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "q8_0": "Q8_0",
        "q4_0": "Q4_0",
    }
    assert [t.name for t in reader.tensors] == list(SHAPES)
    for t in reader.tensors:
        assert t.tensor_type.name == type_names[TYPES[t.name]]
        assert tuple(int(n) for n in t.shape)[::-1] == SHAPES[t.name]
        assert t.data_offset % 32 == 0
        read = gguf.quants.dequantize(t.data, t.tensor_type).reshape(SHAPES[t.name])
        exact = values[t.name]
        if TYPES[t.name] in ("q8_0", "q4_0"):
            np.testing.assert_array_equal(
                read,
                decode_gguf_values(encode_gguf_values(exact, TYPES[t.name], ""), TYPES[t.name]),
            )
            assert 0 < np.abs(read - exact).max() < (0.02 if t.name == "q8" else 0.4)
        else:
            np.testing.assert_array_equal(
                read, exact.astype(DTYPES[TYPES[t.name]]).astype(np.float32)
            )


def test_our_reader_reads_the_written_file(values, tmp_path):
    path = write(tmp_path / "x.gguf", values)
    tensors = open_tensors(path)
    assert tensors.shapes == SHAPES
    assert tensors.metadata["radiance.note"] == "zwölf"
    for t in gguf.GGUFReader(path).tensors:
        location = tensors.locations[t.name]
        assert (location.offset, location.nbytes, location.dtype) == (
            t.data_offset,
            t.n_bytes,
            t.tensor_type.name,
        )
    assert tensors["bf"].dtype == ml_dtypes.bfloat16
    assert tensors["half"].dtype == np.float16


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), KeyError("leaf"), KeyboardInterrupt()],
    ids=repr,
)
@pytest.mark.parametrize("at", ["__x0__", "half", "q4"])
def test_a_failed_write_leaves_nothing(failure, at, values, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    class Failing(dict):
        def __getitem__(self, name):
            if name == at:
                raise failure
            return super().__getitem__(name)

    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)) as error:
        write(path, Failing(values))
    if isinstance(failure, OSError):
        assert "No space left on device" in sentence(error)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_full_disk_is_detected_before_writing(values, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "radiance.base.files.shutil.disk_usage", lambda directory: type("Usage", (), {"free": 100})
    )
    with pytest.raises(OutputError, match=r"free.*needed") as error:
        write(tmp_path / "x.gguf", dict.fromkeys(values))
    sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_rejected(values):
    for dtype in ("float32", "bfloat16", "float16", "q8_0", "q4_0"):
        with pytest.raises(CheckpointError, match="not finite"):
            encode_gguf_values(np.full((2, 32), np.inf, np.float32), dtype, "x")
