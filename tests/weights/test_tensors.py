import errno
import json
import resource
import struct
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from radiance.base.errors import CheckpointError, OutputError
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors, write_safetensors_stream
from radiance.weights.tensors import (
    DTYPES,
    DTYPES_BY_CODE,
    FINITE_CHUNK_SIZE,
    SCALE_SUFFIXES,
    cast_array,
    is_finite,
)
from tests.helpers.toy_files import sentence

F32 = np.dtype(np.float32)
RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.standard_normal((4, 6), np.float32),
    "b.c": RNG.standard_normal(5, np.float32).astype(ml_dtypes.bfloat16),
}


def write_two_tensors(path, value=1.0, metadata=None):
    """Write a file of two tensors with our writer."""
    write_safetensors(
        path,
        {"a": (1000,), "b": ()},
        {"a": F32, "b": F32},
        lambda name: np.full(1000 if name == "a" else (), value),
        metadata or {},
    )


def write_raw(path, header, data=b""):
    """Write a file with any header, given as text or as an object."""
    header_text = header if isinstance(header, str) else json.dumps(header)
    header_bytes = header_text.encode()
    path.write_bytes(struct.pack("<Q", len(header_bytes)) + header_bytes + data)
    return path


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", DTYPES_BY_CODE)
def test_every_type_is_read_as_stored(code, tmp_path):
    dtype = DTYPES_BY_CODE[code]
    values = np.arange(6).reshape(2, 3).astype(dtype)
    entry = {"dtype": code, "shape": [2, 3], "data_offsets": [0, values.nbytes]}
    opened = open_tensors(write_raw(tmp_path / "x.safetensors", {"x": entry}, values.tobytes()))
    assert opened["x"].dtype == dtype
    assert opened.dtypes == {"x": code}
    assert opened.shapes == {"x": (2, 3)}
    np.testing.assert_array_equal(opened["x"], values)


def test_reading_a_tensor_of_unknown_type_fails(tmp_path):
    entry = {"dtype": "F4", "shape": [4, 2], "data_offsets": [0, 4]}
    tensors = open_tensors(write_raw(tmp_path / "x.safetensors", {"x": entry}, bytes(4)))
    assert tensors.shapes == {"x": (4, 2)}
    with pytest.raises(
        CheckpointError, match="of type F4, which is not supported: convert the file to BF16"
    ) as error:
        tensors["x"]
    sentence(error)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8])
@pytest.mark.parametrize(
    "scale",
    [
        np.float32(0.25),
        np.full(1, 3.0, np.float32),
        np.arange(1, 5, dtype=np.float32),
        np.ones((4, 1), np.float32),
    ],
)
@pytest.mark.parametrize("suffix", SCALE_SUFFIXES)
def test_values_are_multiplied_by_their_scales(dtype, scale, suffix, tmp_path):
    """Scaled fp8 and int8 files have one scale, or one per row; their hints are not weights."""
    values = np.array(
        [[1.0, -2.0, 0.5], [3.0, 0.0, 7.0], [-4.0, 2.0, 1.0], [5.0, 6.0, -1.0]]
    ).astype(dtype)
    hints = {
        "scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn),
        "x.scale_input": np.ones(1, np.float32),
        "x.input_scale": np.ones(1, np.float32),
    }
    save_file(
        {"x.weight": values, "x.bias": np.ones(4, np.float32), f"x{suffix}": np.asarray(scale)}
        | hints,
        tmp_path / "x.safetensors",
    )
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert set(tensors.shapes) == {"x.weight", "x.bias"}
    expected = values.astype(np.float32) * np.broadcast_to(np.asarray(scale).reshape(-1, 1), (4, 1))
    assert tensors["x.weight"].dtype == np.float32
    np.testing.assert_array_equal(tensors["x.weight"], expected)


def test_scales_of_blocks_are_rejected(tmp_path):
    save_file(
        {"x.weight": np.ones((4, 8), np.int8), "x.weight_scale": np.ones((4, 2), np.float32)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=r"x.weight_scale of shape \[4, 2\].* use the original"
    ) as error:
        open_tensors(tmp_path / "x.safetensors")
    sentence(error)


def test_a_scale_without_a_weight_is_an_ordinary_tensor(tmp_path):
    save_file({"x.scale_weight": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    assert open_tensors(tmp_path / "x.safetensors").shapes == {"x.scale_weight": (3,)}


# --- several files, and folders -------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """Return a folder with two files and their index."""
    save_file({"a": TENSORS["a"]}, tmp_path / "m-00001-of-00002.safetensors", {"one": "1"})
    save_file(
        {"b.c": TENSORS["b.c"], "unnamed": np.ones(2, np.float32)},
        tmp_path / "m-00002-of-00002.safetensors",
        {"two": "2"},
    )
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {"b.c": "m-00002-of-00002.safetensors", "a": "m-00001-of-00002.safetensors"},
    }
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_an_index_and_its_folder_open_all_files(sharded):
    for path in (sharded, sharded / "m.safetensors.index.json"):
        tensors = open_tensors(path)
        assert list(tensors.shapes) == ["b.c", "a"]
        assert tensors.metadata == {"one": "1", "two": "2"}
        for name, values in TENSORS.items():
            assert tensors[name].tobytes() == values.tobytes()
            assert tensors[name].dtype == values.dtype


def test_the_folder_of_a_pipeline_opens_its_transformer(sharded, tmp_path):
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "pipeline" / "transformer").mkdir()
    save_file(
        TENSORS, tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    assert open_tensors(tmp_path / "pipeline").shapes == {"a": (4, 6), "b.c": (5,)}


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "[]": "no weight_map",
        "{": "no weight_map",
        '{"weight_map": 3}': "no weight_map",
        '{"weight_map": {"a": "absent.safetensors"}}': "names absent.safetensors, which is not",
        '{"weight_map": {"a": "../../etc/passwd"}}': "names passwd, which is not beside it",
        '{"weight_map": {"a": "m-00002-of-00002.safetensors"}}': "lists a, which its files do not",
        '{"weight_map": {"a\\nb": "m-00001-of-00002.safetensors"}}': r"lists a\\nb, which",
        "[" * 100_000: "no weight_map",
        '{"weight_map": {"a": 5}}': "names 5|no weight_map",
    }.items(),
    ids=lambda x: x[:30],
)
def test_a_damaged_index_is_rejected(text, message, sharded):
    (sharded / "m.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(sharded)
    sentence(error)


def test_folders_without_exactly_one_file_are_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"")
    for name, message in {
        "absent.safetensors": "There is no file",
        "empty": "contains no safetensors",
        ".": "one.gguf, two.gguf: name one",
    }.items():
        with pytest.raises(CheckpointError, match=message) as error:
            open_tensors(tmp_path / name)
        sentence(error)


# --- damaged files --------------------------------------------------------------------------------


def test_damaged_files_are_rejected_with_a_message(tmp_path):
    path = tmp_path / "broken.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    header_size = struct.unpack("<Q", content[:8])[0]
    cases = {
        "end cut off": (content[:-5], "not a complete safetensors"),
        "header cut off": (content[: header_size // 2], "not a complete safetensors"),
        "bytes too many": (content + b"\0" * 8, "not a complete safetensors"),
        "header is no JSON": (
            content[:8] + b"}" * header_size + content[8 + header_size :],
            "not a complete safetensors",
        ),
        "text": (b"<!DOCTYPE html><html>404 not found</html>\n" * 20, "not a complete safetensors"),
        "an entry that is a list": (
            write_raw(path, '{"a": ["F32", [1], [0, 4]]}', bytes(4)).read_bytes(),
            "its header is unusual",
        ),
        "too many axes": (
            write_raw(
                path, {"a": {"dtype": "F32", "shape": [1] * 41, "data_offsets": [0, 4]}}, bytes(4)
            ).read_bytes(),
            "it is damaged",
        ),
        "absurd empty axes": (
            write_raw(
                path, {"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}
            ).read_bytes(),
            r"\[0, 4611686018427387904\]",
        ),
        "zip pickle": (b"PK\x03\x04" + bytes(100), "pickle"),
        "old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100), "pickle"),
        "empty": (b"", "not a complete safetensors"),
        "short": (b"\x01\x02", "not a complete safetensors"),
    }
    for name, (damaged_content, message) in cases.items():
        path.write_bytes(damaged_content)
        with pytest.raises(CheckpointError, match=message) as error:
            open_tensors(path)
        assert str(path) in sentence(error), name


def test_a_fingerprint_depends_on_scales(tmp_path):
    def fingerprint(scale, value=1):
        entries = {
            "a.weight": ("I8", [1, 4], bytes([value] * 4)),
            "a.weight_scale": ("F32", [1], np.float32(scale).tobytes()),
        }
        header, data = {}, b""
        for key, (dtype, shape, content) in entries.items():
            header[key] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(content)],
            }
            data += content
        write_raw(tmp_path / "x.safetensors", json.dumps(header), data)
        return open_tensors(tmp_path / "x.safetensors").fingerprint()

    assert fingerprint(0.5) == fingerprint(0.5)
    assert len({fingerprint(0.5), fingerprint(0.25), fingerprint(0.5, 2)}) == 3


def test_pickles_in_folders_and_indexes_are_rejected_with_a_command(tmp_path):
    (tmp_path / "a").mkdir()
    pickle = tmp_path / "a" / "pytorch_model.bin"
    pickle.write_bytes(b"PK\x03\x04" + bytes(100))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}))
    for path in (tmp_path / "a", pickle, index):
        with pytest.raises(
            CheckpointError,
            match=r"is a PyTorch pickle.*\.clone\(\).*pytorch_model[-0-9of]*\.safetensors'",
        ):
            open_tensors(path)
    pickle.with_suffix(".safetensors").write_bytes(b"taken")
    with pytest.raises(CheckpointError, match=r"pytorch_model-converted.safetensors"):
        open_tensors(pickle)


def test_a_header_length_that_equals_a_magic_number_is_accepted(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    for length, start in ((0x80, b"\x80\0"), (0x180, b"\x80\1"), (0x4B50, b"PK")):
        path = write_raw(tmp_path / "x.safetensors", header.ljust(length), bytes(4))
        assert path.read_bytes()[:2] == start
        assert open_tensors(path).shapes == {"a": (1,)}


def test_names_with_line_breaks_are_escaped_in_errors(tmp_path):
    save_file(
        {
            "a\nb": np.ones(3, np.float32),
            "a\nb\r.weight": np.ones((2, 2)),
            "a\nb\r.scale_weight": np.ones(3),
        },
        tmp_path / "x.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"a\\nb\\r.scale_weight") as error:
        open_tensors(tmp_path / "x.safetensors")
    sentence(error)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    tensors = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        [tensors[name] for name in tensors.shapes]


# --- writing --------------------------------------------------------------------------------------


def test_other_readers_read_the_written_file(tmp_path):
    shapes = {"scalar": (), "empty": (0,), "matrix": (2, 3), "half": (2, 2)}
    dtypes = {
        "scalar": F32,
        "empty": F32,
        "matrix": np.dtype(np.float16),
        "half": np.dtype(ml_dtypes.bfloat16),
    }
    values = {name: RNG.standard_normal(shape) for name, shape in shapes.items()}
    values["matrix"] = values["matrix"].T.copy().T  # not contiguous
    write_safetensors(
        tmp_path / "new" / "x.safetensors", shapes, dtypes, values.__getitem__, {"note": "yes"}
    )
    data = (tmp_path / "new" / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert length % 8 == 0
    assert list(json.loads(data[8 : 8 + length])) == ["__metadata__", *shapes]
    tensors = load_file(tmp_path / "new" / "x.safetensors")
    for name, x in tensors.items():
        assert x.dtype == dtypes[name]
        assert x.shape == shapes[name]
        np.testing.assert_array_equal(x, values[name].astype(dtypes[name]))
    assert open_tensors(tmp_path / "new").metadata == {"note": "yes"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "not finite: the file it comes from is damaged"),
        (1e6, "float16 cannot hold: write it in"),
    ],
)
def test_values_that_a_type_cannot_hold_are_rejected(value, message):
    with pytest.raises(CheckpointError, match=message) as error:
        cast_array(np.full(3, value, np.float32), np.dtype(np.float16), "x")
    sentence(error)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_is_finite_detects_every_nonfinite_value(name, value):
    dtype = DTYPES[name]
    all_values = np.arange(1 << min(8 * dtype.itemsize, 16)).astype(f"u{min(dtype.itemsize, 2)}")
    all_values = (
        all_values.view(dtype) if dtype.itemsize < 3 else all_values.view(np.int16).astype(dtype)
    )
    with np.errstate(invalid="ignore"):
        finite_values = all_values[np.isfinite(all_values)]
    assert is_finite(finite_values)
    assert not is_finite(np.append(finite_values, np.array(value, dtype)))


@pytest.mark.parametrize("index", [0, FINITE_CHUNK_SIZE, -1])
def test_is_finite_tests_every_chunk(index):
    values = np.zeros((2, FINITE_CHUNK_SIZE), np.float16)
    assert is_finite(values)
    assert is_finite(values.T)
    values.reshape(-1)[index] = np.nan
    assert not is_finite(values)
    assert not is_finite(values.T)


# --- failed writes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), KeyError("leaf"), KeyboardInterrupt()],
    ids=repr,
)
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_leaves_nothing(failure, old, tmp_path):
    path = tmp_path / "model.safetensors"
    if old:
        path.write_bytes(b"old")

    def get_tensor(name):
        if name == "b":
            raise failure
        return np.ones(1000)

    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)) as error:
        write_safetensors(path, {"a": (1000,), "b": (1000,)}, {"a": F32, "b": F32}, get_tensor, {})
    if isinstance(failure, OSError):
        assert "No space left on device" in sentence(error)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * old


def test_a_stream_in_another_order_is_rejected(tmp_path):
    stream = iter([("b", np.ones(2, np.float32)), ("a", np.ones(2, np.float32))])
    with pytest.raises(AssertionError, match="Expected the tensor a, not b"):
        write_safetensors_stream(
            tmp_path / "x.safetensors", {"a": (2,), "b": (2,)}, {"a": F32, "b": F32}, stream, {}
        )
    assert list(tmp_path.iterdir()) == []


def fake_disk_usage(free):
    return lambda directory: namedtuple("Usage", "total used free")(10**12, 0, free)


def test_a_full_disk_is_detected_before_writing(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_two_tensors(path)
    before = path.read_bytes()
    monkeypatch.setattr("radiance.base.files.shutil.disk_usage", fake_disk_usage(len(before) - 1))
    with pytest.raises(OutputError, match=r"free.*needed") as error:
        write_two_tensors(path, 2.0)
    sentence(error)
    assert path.read_bytes() == before
    monkeypatch.setattr("radiance.base.files.shutil.disk_usage", fake_disk_usage(len(before)))
    write_two_tensors(path, 2.0)
    assert load_file(path)["b"] == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_with_the_last_bytes_is_an_error(tmp_path):
    """NumPy's own writing does not notice this, because it ignores errors of closing a file."""
    path = tmp_path / "x.safetensors"
    write_two_tensors(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 100, hard))
    try:
        with pytest.raises(OutputError):
            write_two_tensors(path, 2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_two_tensors(path)
    before = path.read_bytes()

    def fail(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("radiance.base.files.os.replace", fail)
    with pytest.raises(OutputError, match="Permission denied"):
        write_two_tensors(path, 2.0)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("radiance.base.files.shutil.disk_usage", fake_disk_usage(1))
    with pytest.raises(OutputError):
        write_two_tensors(tmp_path / "a" / "b.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError):
        write_two_tensors(tmp_path / "file" / "b.safetensors")
