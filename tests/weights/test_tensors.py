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
from radiance.weights import tensors
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors
from tests.helpers.toy_files import sentence

F32 = np.dtype(np.float32)
DRAW = np.random.default_rng(0)
TENSORS = {
    "a": DRAW.standard_normal((4, 6), np.float32),
    "b.c": DRAW.standard_normal(5, np.float32).astype(ml_dtypes.bfloat16),
}


def write(path, value=1.0, metadata=None):
    """A file of two tensors by our writer."""
    write_safetensors(
        path,
        {"a": (1000,), "b": ()},
        {"a": F32, "b": F32},
        lambda name: np.full(1000 if name == "a" else (), value),
        metadata or {},
    )


def raw(path, header, data=b""):
    """A file with that header, which may be anything."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", tensors.DTYPES_BY_CODE)
def test_every_type_is_read_as_it_is_stored(code, tmp_path):
    dtype = tensors.DTYPES_BY_CODE[code]
    values = np.arange(6).reshape(2, 3).astype(dtype)
    entry = {"dtype": code, "shape": [2, 3], "data_offsets": [0, values.nbytes]}
    opened = open_tensors(raw(tmp_path / "x.safetensors", {"x": entry}, values.tobytes()))
    assert opened["x"].dtype == dtype
    assert opened.dtypes == {"x": code}
    assert opened.shapes == {"x": (2, 3)}
    np.testing.assert_array_equal(opened["x"], values)


def test_an_unknown_type_is_seen_when_it_is_read(tmp_path):
    entry = {"dtype": "F4", "shape": [4, 2], "data_offsets": [0, 4]}
    tensors = open_tensors(raw(tmp_path / "x.safetensors", {"x": entry}, bytes(4)))
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
@pytest.mark.parametrize("suffix", tensors.SCALE_SUFFIXES)
def test_scaled_values_are_multiplied(dtype, scale, suffix, tmp_path):
    """As in scaled fp8 and int8 files: one scale, or one a row; their other notes are no weights."""
    values = np.array(
        [[1.0, -2.0, 0.5], [3.0, 0.0, 7.0], [-4.0, 2.0, 1.0], [5.0, 6.0, -1.0]]
    ).astype(dtype)
    notes = {
        "scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn),
        "x.scale_input": np.ones(1, np.float32),
        "x.input_scale": np.ones(1, np.float32),
        "x.comfy_quant": np.zeros(9, np.uint8),
    }
    save_file(
        {"x.weight": values, "x.bias": np.ones(4, np.float32), f"x{suffix}": np.asarray(scale)}
        | notes,
        tmp_path / "x.safetensors",
    )
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert set(tensors.shapes) == {"x.weight", "x.bias"}
    expected = values.astype(np.float32) * np.broadcast_to(np.asarray(scale).reshape(-1, 1), (4, 1))
    assert tensors["x.weight"].dtype == np.float32
    np.testing.assert_array_equal(tensors["x.weight"], expected)


def test_scales_of_blocks_are_not_read(tmp_path):
    save_file(
        {"x.weight": np.ones((4, 8), np.int8), "x.weight_scale": np.ones((4, 2), np.float32)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=r"x.weight_scale of shape \[4, 2\].* convert the file to BF16"
    ) as error:
        open_tensors(tmp_path / "x.safetensors")
    sentence(error)


def test_a_scale_without_a_weight_is_a_tensor_like_others(tmp_path):
    save_file({"x.scale_weight": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    assert open_tensors(tmp_path / "x.safetensors").shapes == {"x.scale_weight": (3,)}


# --- several files, and folders -----------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A folder of two files and their index."""
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


def test_an_index_and_its_folder(sharded):
    for path in (sharded, sharded / "m.safetensors.index.json"):
        tensors = open_tensors(path)
        assert list(tensors.shapes) == ["b.c", "a"]
        assert tensors.metadata == {"one": "1", "two": "2"}
        for name, values in TENSORS.items():
            assert tensors[name].tobytes() == values.tobytes()
            assert tensors[name].dtype == values.dtype


def test_a_pipelines_folder(sharded, tmp_path):
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    (tmp_path / "pipeline" / "transformer").mkdir()
    save_file(
        TENSORS, tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    assert open_tensors(tmp_path / "pipeline").shapes == {"a": (4, 6), "b.c": (5,)}


@pytest.mark.parametrize(
    ("text", "told"),
    {
        "[]": "no weight_map",
        "{": "no weight_map",
        '{"weight_map": 3}': "no weight_map",
        '{"weight_map": {"a": "absent.safetensors"}}': "names absent.safetensors, which is not beside it",
        '{"weight_map": {"a": "../../etc/passwd"}}': "names passwd, which is not beside it",
        '{"weight_map": {"a": "m-00002-of-00002.safetensors"}}': "lists a, which its files do not contain",
        '{"weight_map": {"a\\nb": "m-00001-of-00002.safetensors"}}': r"lists a\\nb, which",
        "[" * 100_000: "no weight_map",
        '{"weight_map": {"a": 5}}': "names 5|no weight_map",
    }.items(),
    ids=lambda x: x[:30],
)
def test_a_bad_index(text, told, sharded):
    (sharded / "m.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=told) as error:
        open_tensors(sharded)
    sentence(error)


def test_folders_that_say_too_little(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"")
    for name, told in {
        "absent.safetensors": "There is no file",
        "empty": "contains no safetensors",
        ".": "one.gguf, two.gguf: name one",
    }.items():
        with pytest.raises(CheckpointError, match=told) as error:
            open_tensors(tmp_path / name)
        sentence(error)


# --- files that are none ------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "broken.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    start = struct.unpack("<Q", whole[:8])[0]
    cases = {
        "end cut off": (whole[:-5], "not a complete safetensors"),
        "header cut off": (whole[: start // 2], "not a complete safetensors"),
        "bytes too many": (whole + b"\0" * 8, "not a complete safetensors"),
        "header is no JSON": (whole[:8] + b"}" * start + whole[8 + start :], "not a complete safetensors"),
        "text": (b"<!DOCTYPE html><html>404 not found</html>\n" * 20, "not a complete safetensors"),
        "an entry that is a list": (raw(path, '{"a": ["F32", [1], [0, 4]]}', bytes(4)).read_bytes(), "its header is unusual"),
        "too many axes": (raw(path, {"a": {"dtype": "F32", "shape": [1] * 41, "data_offsets": [0, 4]}}, bytes(4)).read_bytes(), "it is damaged"),
        "absurd empty axes": (
            raw(path, {"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}).read_bytes(), r"\[0, 4611686018427387904\]"
        ),
        "zip pickle": (b"PK\x03\x04" + bytes(100), "pickle"),
        "old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100), "pickle"),
        "empty": (b"", "not a complete safetensors"),
        "short": (b"\x01\x02", "not a complete safetensors"),
    }  # fmt: skip
    for name, (content, told) in cases.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=told) as error:
            open_tensors(path)
        assert str(path) in sentence(error), name


def test_a_fingerprint_knows_scales_too(tmp_path):
    def identity(scale, value=1):
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
        raw(tmp_path / "x.safetensors", json.dumps(header), data)
        return open_tensors(tmp_path / "x.safetensors").fingerprint()

    assert identity(0.5) == identity(0.5)
    assert len({identity(0.5), identity(0.25), identity(0.5, 2)}) == 3


def test_pickles_in_folders_and_behind_an_index_are_named_too(tmp_path):
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
    with pytest.raises(CheckpointError, match="pytorch_model-converted.safetensors"):
        open_tensors(pickle)


def test_a_header_whose_length_looks_like_something_else(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    for length, start in ((0x80, b"\x80\0"), (0x180, b"\x80\1"), (0x4B50, b"PK")):
        path = raw(tmp_path / "x.safetensors", header.ljust(length), bytes(4))
        assert path.read_bytes()[:2] == start
        assert open_tensors(path).shapes == {"a": (1,)}


def test_names_with_line_breaks_make_one_line(tmp_path):
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


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    tensors = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        [tensors[name] for name in tensors.shapes]


# --- writing ------------------------------------------------------------------------------------------------------------


def test_written_is_what_other_readers_read(tmp_path):
    shapes = {"scalar": (), "empty": (0,), "matrix": (2, 3), "half": (2, 2)}
    dtypes = {
        "scalar": F32,
        "empty": F32,
        "matrix": np.dtype(np.float16),
        "half": np.dtype(ml_dtypes.bfloat16),
    }
    values = {name: DRAW.standard_normal(shape) for name, shape in shapes.items()}
    values["matrix"] = values["matrix"].T.copy().T  # not contiguous
    write_safetensors(
        tmp_path / "new" / "x.safetensors", shapes, dtypes, values.__getitem__, {"note": "yes"}
    )
    data = (tmp_path / "new" / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert length % 8 == 0
    assert list(json.loads(data[8 : 8 + length])) == ["__metadata__", *shapes]
    read = load_file(tmp_path / "new" / "x.safetensors")
    for name, x in read.items():
        assert x.dtype == dtypes[name]
        assert x.shape == shapes[name]
        np.testing.assert_array_equal(x, values[name].astype(dtypes[name]))
    assert open_tensors(tmp_path / "new").metadata == {"note": "yes"}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.nan, "not finite: the file it comes from is damaged"),
        (1e6, "float16 cannot hold: write it in"),
    ],
)
def test_values_that_cannot_be_written(value, told):
    with pytest.raises(CheckpointError, match=told) as error:
        tensors.cast_array(np.full(3, value, np.float32), np.dtype(np.float16), "x")
    sentence(error)


@pytest.mark.parametrize("name", tensors.DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite_sees_every_value_that_is_not(name, value):
    dtype = tensors.DTYPES[name]
    every = np.arange(1 << min(8 * dtype.itemsize, 16)).astype(f"u{min(dtype.itemsize, 2)}")
    every = every.view(dtype) if dtype.itemsize < 3 else every.view(np.int16).astype(dtype)
    with np.errstate(invalid="ignore"):
        good = every[np.isfinite(every)]
    assert tensors.is_finite(good)
    assert not tensors.is_finite(np.append(good, np.array(value, dtype)))


# --- failed writes ------------------------------------------------------------------------------------------------------


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

    def tensor(name):
        if name == "b":
            raise failure
        return np.ones(1000)

    with pytest.raises(OutputError if isinstance(failure, OSError) else type(failure)) as error:
        write_safetensors(path, {"a": (1000,), "b": (1000,)}, {"a": F32, "b": F32}, tensor, {})
    if isinstance(failure, OSError):
        assert "No space left on device" in sentence(error)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * old


def disk_with(free):
    return lambda directory: namedtuple("Usage", "total used free")(10**12, 0, free)


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write(path)
    before = path.read_bytes()
    monkeypatch.setattr("radiance.base.files.shutil.disk_usage", disk_with(len(before) - 1))
    with pytest.raises(OutputError, match="free.*needed") as error:
        write(path, 2.0)
    sentence(error)
    assert path.read_bytes() == before
    monkeypatch.setattr("radiance.base.files.shutil.disk_usage", disk_with(len(before)))
    write(path, 2.0)
    assert load_file(path)["b"] == 2
    assert list(tmp_path.iterdir()) == [path]


def test_the_last_bytes_that_find_no_room_are_missed(tmp_path):
    """Which NumPy's own writing does not notice, for it looks at no error of closing."""
    path = tmp_path / "x.safetensors"
    write(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 100, hard))
    try:
        with pytest.raises(OutputError):
            write(path, 2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_that_cannot_take_its_name(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write(path)
    before = path.read_bytes()

    def fail(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("radiance.base.files.os.replace", fail)
    with pytest.raises(OutputError, match="Permission denied"):
        write(path, 2.0)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("radiance.base.files.shutil.disk_usage", disk_with(1))
    with pytest.raises(OutputError):
        write(tmp_path / "a" / "b.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError):
        write(tmp_path / "file" / "b.safetensors")
