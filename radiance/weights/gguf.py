"""GGUF files (ggml's format): read whatever their types, written as ComfyUI-GGUF and stable-diffusion.cpp expect them.

The header is parsed here and not by the `gguf` package, whose reader trusts every count in the file and maps all of it to memory.
The package quantises and dequantises.
"""

import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from radiance.weights.files import AXES, CODES, DTYPES, CheckpointError, Packed, Place, Shapes, Tensors, cast, replacing, require_space

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
# ggml's numbers of the types that NumPy knows; the others are the package's.
PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
KEPT = 64  # values of an array that are kept; vocabularies are longer, and not needed
HEADER_LIMIT = 100_000_000  # bytes, as in safetensors
SHAPE_KEY = "comfy.gguf.orig_shape."  # what ComfyUI-GGUF writes when it folds axes together
QUANTISED = ("q8_0", "q4_0")  # what is written; whatever a file has is copied
TO_GGML = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("Quantised GGUF files need the gguf package: pip install 'radiance[gguf]'.") from None
    return gguf


def kind_of(dtype: str) -> Any:
    """ggml's type of our name (bfloat16, q8_0) or of its own (BF16, Q8_0)."""
    return package().GGMLQuantizationType[TO_GGML.get(dtype, dtype.upper())]


class _Reader:
    """The header's numbers and texts, none of which may reach beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size = path, file, path.stat().st_size
        self.left = min(self.size, HEADER_LIMIT)

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise CheckpointError(f"{self.path} is not a whole GGUF file: its header is cut short or absurd. Copy or download it again.")
        self.left -= count
        data = self.file.read(count)
        if len(data) < count:
            raise CheckpointError(f"{self.path} is not a whole GGUF file: it ends inside its header. Copy or download it again.")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        """Of arrays the first few items."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        item, count = self.number("<I"), self.number("<Q")
        if kind != ARRAY or (item not in SCALARS and item != STRING):
            raise CheckpointError(f"{self.path} holds metadata of an unknown type ({kind}, {item}): it is damaged or of a later version.")
        kept = [self.value(item) for _ in range(min(count, KEPT))]
        if item in SCALARS:
            self.take((count - len(kept)) * struct.calcsize(SCALARS[item]))
        else:
            for _ in range(count - len(kept)):
                self.take(self.number("<Q"))
        return kept


class GgufTensors(Tensors):
    """Open GGUF tensors; quantised ones are given as float32."""

    def values(self, place: Place) -> np.ndarray:
        if place.dtype in CODES:
            return super().values(place)
        if place.size == 0:
            return np.zeros(place.shape, np.float32)
        rows = prod(place.shape[:-1]) if _in_rows(place) else 1
        return self.expanded(self.raw(place).reshape(rows, -1), place.dtype).reshape(place.shape)

    def expanded(self, rows: np.ndarray, dtype: str) -> np.ndarray:
        """The values of rows of bytes."""
        try:
            return decoded(rows, dtype)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path} holds values of type {dtype}, which the gguf package cannot expand: take another quantisation."
            ) from None

    def store(self, key: str) -> str | None:
        return super().store(key) if self.in_rows(key) else None

    def in_rows(self, key: str) -> bool:
        """Whether a tensor is quantised, and every row has blocks of its own."""
        return self.dtypes[key] not in CODES and _in_rows(self.places[key])

    def rows(self, key: str) -> np.ndarray:
        """The stored bytes of a tensor that is `in_rows`."""
        place = self.places[key]
        return self.raw(place).reshape(*place.shape[:-1], -1)

    def packed(self, key: str) -> Packed:
        *stack, columns = self.places[key].shape
        blocks = self.rows(key).reshape(*stack, -1, 34)  # of Q8_0: a float16, then 32 numbers
        return Packed(blocks[..., 2:].reshape(*stack, columns).view(np.int8), blocks[..., :2].reshape(*stack, -1).view(np.float16))


def _in_rows(place: Place) -> bool:
    """ComfyUI-GGUF folds axes together where blocks would not divide the last one."""
    return bool(place.shape) and place.shape[-1] % package().GGML_QUANT_SIZES[kind_of(place.dtype)][0] == 0


def open_gguf(path: Path) -> GgufTensors:
    """The tensors of a GGUF file, in the order of axes of PyTorch. Raises CheckpointError when it is damaged."""
    with path.open("rb") as file:
        reader = _Reader(path, file)
        reader.take(4)
        version, count, pairs = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
        if version not in (2, 3):
            raise CheckpointError(f"{path} is GGUF of version {version}, and 2 and 3 are read (little-endian ones): convert it anew.")
        metadata = {}
        for _ in range(pairs):
            key = reader.text()
            metadata[key] = reader.value(reader.number("<I"))
        infos = [_info(reader) for _ in range(count)]
        position = file.tell()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{path} is aligned to {alignment}, which is no sensible number: it is damaged.")
    start = -(-position // alignment) * alignment
    places: dict[str, Place] = {}
    end = 0
    for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
        dtype, size = _size(path, name, shape, kind)
        if (size and offset < end) or start + offset + size > reader.size or name in places:
            raise CheckpointError(f"{path} is not a whole GGUF file: {name} overlaps another tensor or lies beyond the end.")
        end = max(end, offset + size)
        original = metadata.get(f"{SHAPE_KEY}{name}", list(shape))
        fits = isinstance(original, list) and all(isinstance(n, int) and n >= 0 for n in original) and prod(original) == prod(shape)
        if not fits:
            raise CheckpointError(f"{path} says that {name} has the shape {original}, which does not fit its {list(shape)}: it is damaged.")
        places[name] = Place(path, start + offset, size, tuple(original), dtype)
    return GgufTensors(path, places, {k: str(v) for k, v in metadata.items() if not isinstance(v, list)})


def _info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, axes = reader.text(), reader.number("<I")
    if axes > AXES:
        raise CheckpointError(f"{reader.path} holds a tensor of {axes} axes: it is damaged.")
    shape = tuple(reader.number("<Q") for _ in range(axes))[::-1]
    return name, shape, reader.number("<I"), reader.number("<Q")


def _size(path: Path, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """The type's name and the bytes of the tensor."""
    if kind in PLAIN:
        return PLAIN[kind], prod(shape) * CODES[PLAIN[kind]].itemsize
    gguf = package()
    try:
        dtype = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[dtype]
    except (ValueError, KeyError):
        raise CheckpointError(f"{path} holds {name} in a type ({kind}) that the gguf package does not know: update it.") from None
    if not shape or shape[-1] % block:
        raise CheckpointError(f"{path} holds {name} of shape {list(shape)} in blocks of {block}, which do not fit: it is damaged.")
    return dtype.name, prod(shape) // block * size


def write_gguf(
    path: str | Path,
    shapes: Shapes,
    dtypes: Mapping[str, str],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
):
    """Writes `tensor(key)`, already `encoded`, for every key of `shapes`, in order, holding one at a time; whole or not at all.

    dtypes: float32, float16, bfloat16 or a quantised type of ggml for each. The architecture is `flux`, as ComfyUI-GGUF has no
    other name for Chroma's tensors.
    """
    gguf = package()
    path = Path(path)
    with replacing(path) as part:
        writer = gguf.GGUFWriter(part, "flux")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            writer.add_string(key, value)
        total = 0
        for key, shape in shapes.items():
            kind = kind_of(dtypes[key])
            block, size = gguf.GGML_QUANT_SIZES[kind]
            bytes_ = prod(shape) // block * size
            total += bytes_ + 256
            writer.add_tensor_info(key, shape, np.dtype(np.float32), bytes_, raw_dtype=kind)
        require_space(path.parent, total)
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for key in shapes:
                writer.write_tensor_data(tensor(key))


def encoded(array: np.ndarray, dtype: str, key: str) -> np.ndarray:
    """`array` in a type of GGUF files; quantised ones as bytes."""
    if dtype in DTYPES:
        out = cast(array, DTYPES[dtype], key)
        return out.view(np.uint16) if dtype == "bfloat16" else out
    return package().quants.quantize(cast(array, DTYPES["float32"], key), kind_of(dtype))


def decoded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of `encoded` for quantised types, as float32."""
    return package().quants.dequantize(array, kind_of(dtype))
