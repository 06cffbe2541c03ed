"""Files of named tensors: opened with one clear sentence when they cannot be, read and written tensor by tensor, never left by halves.

Reading is plain reading. A memory map would be shorter, but its pages count as resident memory, and a 19 GB file has many.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

Shapes = Mapping[str, tuple[int, ...]]

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
CODES = {
    "F64": np.dtype(np.float64), "F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"],
    "F8_E4M3": DTYPES["float8_e4m3fn"], "F8_E5M2": DTYPES["float8_e5m2"], "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES = {dtype: code for code, dtype in CODES.items()}
# Scaled fp8 and int8 files keep beside a weight what it is multiplied by; their other notes are for computing in fp8.
SCALES = (".scale_weight", ".weight_scale")
NOTES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
# What a matrix of a stored type can stay in memory as (`model/stored.py`): int8 where the file has scales of it.
STORES = {"Q8_0": "q8_0", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
AXES = 8  # of a tensor at most
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
SAMPLE = 16_384  # bytes, of which four are taken from every large tensor for a fingerprint


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message says what was wrong and what to do.

    It is one line, whatever the names in a file are.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class Place(NamedTuple):
    """Where the values of a tensor lie."""

    file: Path
    offset: int
    size: int  # bytes
    shape: tuple[int, ...]
    dtype: str  # as stored: F32, BF16, F8_E4M3, Q8_0, …


class Packed(NamedTuple):
    """A matrix as a file keeps it small: numbers, and what those of a row, or of a block of it, are multiplied by."""

    values: np.ndarray  # [out, in], int8 or fp8
    scales: np.ndarray  # [out, in / block], float16 of Q8_0, or [out, 1], float32

    def finite(self) -> bool:
        largest = 127 if self.values.dtype == np.int8 else float(ml_dtypes.finfo(self.values.dtype).max)
        with np.errstate(over="ignore", invalid="ignore"):
            return finite(self.values) and bool(np.isfinite(self.scales.astype(np.float32) * np.float32(largest)).all())

    def part(self, axis: int, begin: int, end: int) -> "Packed":
        """Rows (axis 0) or inputs (axis 1), of the latter whole blocks."""
        if axis == 0:
            return Packed(self.values[begin:end], self.scales[begin:end])
        if self.scales.shape[1] == 1:
            return Packed(self.values[:, begin:end], self.scales)
        block = self.values.shape[1] // self.scales.shape[1]
        return Packed(self.values[:, begin:end], self.scales[:, begin // block : end // block])


class Tensors:
    """Open tensors: names, shapes and stored types without reading; values one at a time."""

    def __init__(self, path: Path, places: Mapping[str, Place], metadata: Mapping[str, str]):
        self.path, self.metadata, self.places = path, metadata, dict(places)
        self._scales: dict[str, Place] = {}
        for key, place in places.items():
            # What has no values may claim any shape; NumPy must be able to make it all the same.
            if len(place.shape) > AXES or math.prod(max(1, n) for n in place.shape) >= 1 << 48:
                raise CheckpointError(f"{path} holds {key} of shape {list(place.shape)}: it is damaged.")
            weight = key[: key.rfind(".")] + ".weight"
            if key.endswith(SCALES) and weight in places:
                self._scales[weight] = self.places.pop(key)
                rows = places[weight].shape[:1]
                if math.prod(place.shape) not in (1, *rows):
                    raise CheckpointError(
                        f"{path} holds {key} of shape {list(place.shape)}, and one scale of all or of each of the {list(rows)} rows is "
                        f"read: convert the file to BF16 first."
                    )
            if key.endswith(".comfy_quant") and _rotated(self.raw(place)):
                raise CheckpointError(f"{path} holds {weight} rotated (ConvRot), which is not read: convert another file of the model.")
        self.places = {k: p for k, p in self.places.items() if not k.endswith(NOTES)}
        self.shapes: Shapes = {k: p.shape for k, p in self.places.items()}
        self.dtypes: Mapping[str, str] = {k: p.dtype for k, p in self.places.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        """The values, in their stored type; quantised and scaled ones as float32."""
        values = self.values(self.places[key])
        if key not in self._scales:
            return values
        scale = self.values(self._scales[key]).astype(np.float32)
        scale = scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.size > 1 else scale.reshape(())
        return np.multiply(values, scale, dtype=np.float32)

    def store(self, key: str) -> str | None:
        """As what a matrix stays in memory just as it is in the file; None for types of which there is no such thing."""
        kind = self.dtypes[key]
        return None if kind == "I8" and key not in self._scales else STORES.get(kind)

    def scale_shape(self, key: str) -> tuple[int, ...] | None:
        """Of the scales that lie beside a tensor: one number, or one of each row."""
        return self._scales[key].shape if key in self._scales else None

    def packed(self, key: str) -> Packed:
        """The values of a tensor that has a `store`, as they lie in the file."""
        values = self.values(self.places[key])
        scales = self.values(self._scales[key]).astype(np.float32) if key in self._scales else np.ones(1, np.float32)
        return Packed(values, np.broadcast_to(scales.reshape(-1, 1), (len(values), 1)))

    def fingerprint(self, keys: Mapping[str, str] | None = None) -> str:
        """A hash of all names, shapes, types and small tensors, and of samples of the large ones: 14 MB of a file of 10 GB.

        keys: the names to hash, and whose tensors they are; the file's own when None. Files of other containers have the same one when
        their tensors are stored alike.
        """
        found = hashlib.blake2b(digest_size=16)
        keys = keys or {key: key for key in self.places}
        named = [(name, places[key]) for places in (self.places, self._scales) for name, key in keys.items() if key in places]
        for name, place in sorted(named, key=lambda pair: pair[0]):
            found.update(repr((name, place.shape, place.dtype)).encode())
            whole = place.size <= 4 * SAMPLE
            for begin in (0,) if whole else np.linspace(0, place.size - SAMPLE, 4).astype(int):
                found.update(np.fromfile(place.file, np.uint8, place.size if whole else SAMPLE, offset=place.offset + int(begin)).tobytes())
        return found.hexdigest()

    def values(self, place: Place) -> np.ndarray:
        if place.dtype not in CODES:
            raise CheckpointError(f"{self.path} holds values of type {place.dtype}, which is not read: convert the file to BF16 first.")
        return self.raw(place).view(CODES[place.dtype]).reshape(place.shape)

    def raw(self, place: Place) -> np.ndarray:
        """The stored bytes."""
        data = np.fromfile(place.file, np.uint8, place.size, offset=place.offset)
        if len(data) < place.size:
            raise CheckpointError(f"{place.file} became shorter while it was read: copy or download it again.")
        return data


def _rotated(mark: np.ndarray) -> bool:
    """Whether ComfyUI's mark beside a matrix says that its inputs are rotated."""
    try:
        told = json.loads(mark.tobytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and bool(told.get("convrot"))


def open_tensors(path: str | Path) -> Tensors:
    """The tensors of a safetensors or GGUF file, of an index over several safetensors files, or of the folder that holds one of them.

    Raises CheckpointError when there is none, when it is damaged, and for pickles, which are never opened.
    """
    path = _inside(Path(path).expanduser())
    if path.name.endswith(".index.json"):
        return _open_index(path)
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header, which may look like anything, and then the header's "{".
    if start[8:] != b"{" and start[:4] == b"GGUF":
        from radiance.weights.gguf import open_gguf

        return open_gguf(path)
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise _pickled(path)
    places, metadata = _header(path)
    return Tensors(path, places, metadata)


def _pickled(path: Path) -> CheckpointError:
    safe = path.with_suffix(".safetensors")
    if safe.exists():
        safe = path.with_name(f"{path.stem}-converted.safetensors")
    return CheckpointError(
        f"{path} is a PyTorch pickle, which can run code when it is opened: turn it into safetensors where PyTorch is installed, with "
        f'python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.contiguous().clone() for k, v in torch.load('{path}', weights_only=True, map_location='cpu').items()}}, "
        f"'{safe}')\"."
    )


def _inside(path: Path) -> Path:
    """The one file that a folder is about."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"There is no file {path}.")
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.gguf"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(f"{path} holds {', '.join(p.name for p in found)}: name one of them.")
    if (path / "transformer").is_dir():  # a pipeline's folder of diffusers
        return _inside(path / "transformer")
    if pickles := sorted(x for x in path.iterdir() if x.suffix in PICKLES and x.is_file()):
        raise _pickled(pickles[0])
    raise CheckpointError(f"{path} holds no safetensors or GGUF file.")


def _header(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Places and metadata of a safetensors file, checked by the safetensors library."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): copy or download it again.") from None
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = file.read(length)
    places = {}
    try:
        for key, entry in json.loads(header).items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                places[key] = Place(path, 8 + length + begin, end - begin, tuple(entry["shape"]), entry["dtype"])
    except (ValueError, TypeError):  # JSON that the library reads in ways of its own, which no tool writes
        raise CheckpointError(f"{path} is not a whole safetensors file (its header is unusual): copy or download it again.") from None
    return places, metadata


def _open_index(path: Path) -> Tensors:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        wanted = {str(key): path.parent / Path(name).name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is not an index of safetensors files: it has no weight_map from tensors to files.") from None
    places, metadata = {}, {}
    for file in sorted(set(wanted.values())):
        if file.suffix in PICKLES:
            raise _pickled(file)
        if not file.is_file():
            raise CheckpointError(f"{path} names {file.name}, which is not beside it: copy or download that too.")
        found, noted = _header(file)
        places |= found
        metadata |= noted
    if missing := [key for key in wanted if key not in places or places[key].file != wanted[key]]:
        raise CheckpointError(f"{path} promises {', '.join(missing[:5])}, which the files do not hold: copy or download them again.")
    return Tensors(path, {key: places[key] for key in wanted}, metadata)


def write_safetensors(
    path: str | Path,
    shapes: Shapes,
    dtypes: Mapping[str, np.dtype],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
):
    """Writes `tensor(key)` for every key of `shapes`, in order, holding one at a time.

    The file appears under its name only when it is whole. Raises CheckpointError when the disk has no room for it, and for
    values that are not finite or that the type cannot hold.
    """
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, shape in shapes.items():
        size = math.prod(shape) * dtypes[key].itemsize
        header[key] = {"dtype": NAMES[dtypes[key]], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    require_space(path.parent, offset + len(text) + 8)
    with replacing(path) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, shape in shapes.items():
            values = np.ascontiguousarray(cast(tensor(key), dtypes[key], key)).reshape(shape)
            file.write(values.reshape(-1).view(np.uint8).data)  # tofile says nothing of what a full disk loses at its end


def cast(array: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    """`array` as `dtype`. Raises CheckpointError when values are not finite, or would not be."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = array.astype(dtype, copy=False)
    if not finite(out):
        if not finite(array):
            raise CheckpointError(f"{key} holds values that are not finite: the file it comes from is damaged.")
        raise CheckpointError(f"{key} has values that {dtype} cannot hold: write it in float32 or bfloat16.")
    return out


def finite(array: np.ndarray) -> bool:
    """Whether all values are finite; of bfloat16 by its bits, which is ten times as fast."""
    if array.dtype == DTYPES["bfloat16"]:
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


@contextmanager
def replacing(path: Path):
    """A temporary file beside `path` that takes its name when the block ends well, and is gone when it does not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _unfinished.add(part)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if part.is_file():
            with part.open("rb") as written:
                os.fsync(written.fileno())  # or a name could outlive a power cut without what it names
        os.replace(part, path)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()
        _unfinished.discard(part)


_unfinished: set[Path] = set()  # files and folders inside `replacing`


def remove_unfinished():
    """Removes what `replacing` would, for a process that is about to end."""
    for part in list(_unfinished):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def unwritten(path: Path, error: OSError) -> CheckpointError:
    """What to say of a file that could not be written whole."""
    remedy = "make room there and give the same command again" if is_full(error) else "nothing was changed"
    return CheckpointError(f"{path} could not be written ({error.strerror or error}): {remedy}.")


def is_full(error: BaseException) -> bool:
    """Whether a disk, a quota, or what a file may grow to is used up; what libraries make of it keeps at least the system's words."""
    kinds = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in kinds or any(os.strerror(kind) in str(error) for kind in kinds)


def require_folder(folder: Path):
    """Raises CheckpointError when files could not be put into `folder`, which need not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise CheckpointError(f"{there} is a file, and nothing can be written below it: give a folder.")


def require_file(path: Path):
    """Raises CheckpointError when `path` could not be written as a file."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the name of a file.")
    require_folder(path.absolute().parent)


def require_space(directory: Path, needed: int):
    """Raises CheckpointError when `directory` has not `needed` bytes free."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{directory} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed: make room or choose another directory."
        )
