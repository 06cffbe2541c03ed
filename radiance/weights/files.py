"""Safetensors files: opened with one clear sentence when they cannot be, written tensor by tensor and never by halves."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
CODES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.int64): "I64"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; the message says what was wrong and what to do."""


class Tensors:
    """An open safetensors file: shapes without reading, tensors one at a time."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"There is no file {self.path}.")
        with self.path.open("rb") as file:
            start = file.read(9)
        # A safetensors file starts with the length of its header, which may look like anything, and then the header's "{".
        if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            raise CheckpointError(f"{self.path} is a PyTorch pickle, which can run code when loaded: save it as safetensors first.")
        if start[8:] != b"{" and start[:4] == b"GGUF":
            raise CheckpointError(f"{self.path} is a GGUF file, which is not a safetensors checkpoint.")
        try:
            self._file = safe_open(self.path, framework="numpy")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.shapes: dict[str, tuple[int, ...]] = {k: tuple(self._file.get_slice(k).get_shape()) for k in self._file.keys()}  # noqa: SIM118 — not a dict
        except SafetensorError as error:
            raise CheckpointError(f"{self.path} is not a whole safetensors file ({error}): copy or download it again.") from None

    def __getitem__(self, key: str) -> np.ndarray:
        try:
            return self._file.get_tensor(key)
        except AttributeError:  # NumPy has no such type
            kind = self._file.get_slice(key).get_dtype()
            raise CheckpointError(f"{self.path}: {key} is of type {kind}, which is not read: convert the file to BF16 first.") from None


def write_safetensors(
    path: str | Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
):
    """Writes `tensor(key)` for every key of `shapes`, in order, holding one at a time.

    The file appears under its name only when it is whole. Raises CheckpointError when the disk has no room for it.
    """
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtypes[key].itemsize
        header[key] = {"dtype": CODES[dtypes[key]], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    require_space(path.parent, offset + len(text) + 8)
    with replacing(path) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, shape in shapes.items():
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(tensor(key), dtype=dtypes[key]).reshape(shape)
            if not np.isfinite(array).all():
                raise CheckpointError(f"{key} has values that {array.dtype} cannot hold: write {path} in float32 or bfloat16.")
            file.write(array.tobytes())


@contextmanager
def replacing(path: Path):
    """A temporary file beside `path` that takes its name when the block ends well, and is gone when it does not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}): nothing was changed.") from error
    finally:
        with suppress(OSError):
            part.unlink()


def require_space(directory: Path, needed: int):
    """Raises CheckpointError when `directory` has not `needed` bytes free."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{directory} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed: make room or choose another directory."
        )
