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

from radiance.base.errors import CheckpointError
from radiance.base.files import replace_atomically, require_space
from radiance.weights.tensors import (
    DTYPES,
    DTYPES_BY_CODE,
    MAX_AXES,
    QuantizedTensor,
    TensorLocation,
    Tensors,
    TensorShapes,
    cast_array,
)

SCALAR_FORMATS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING_TYPE, ARRAY_TYPE = 8, 9
# ggml's numbers of the types that NumPy knows; the others are the package's.
UNQUANTIZED_TYPES = {
    0: "F32",
    1: "F16",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    30: "BF16",
}
MAX_ARRAY_ITEMS = 64  # values of an array that are kept; vocabularies are longer, and not needed
MAX_HEADER_SIZE = 100_000_000  # bytes, as in safetensors
ORIGINAL_SHAPE_KEY = (
    "comfy.gguf.orig_shape."  # what ComfyUI-GGUF writes when it folds axes together
)
QUANTIZED_DTYPES = ("q8_0", "q4_0")  # what is written; whatever a file has is copied
GGML_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "Quantized GGUF files need the gguf package: pip install 'radiance[gguf]'."
        ) from None
    return gguf


def ggml_type(dtype: str) -> Any:
    """Ggml's type of our name (bfloat16, q8_0) or of its own (BF16, Q8_0)."""
    return import_gguf().GGMLQuantizationType[GGML_NAMES.get(dtype, dtype.upper())]


class _HeaderReader:
    """The header's numbers and texts, none of which may reach beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size = path, file, path.stat().st_size
        self.remaining = min(self.size, MAX_HEADER_SIZE)

    def read_bytes(self, count: int) -> bytes:
        if count > self.remaining:
            raise CheckpointError(
                f"{self.path} is not a whole GGUF file: its header is cut short or absurd. Copy or download it again."
            )
        self.remaining -= count
        data = self.file.read(count)
        if len(data) < count:
            raise CheckpointError(
                f"{self.path} is not a whole GGUF file: it ends inside its header. Copy or download it again."
            )
        return data

    def read_number(self, struct_format: str) -> Any:
        return struct.unpack(struct_format, self.read_bytes(struct.calcsize(struct_format)))[0]

    def read_string(self) -> str:
        return self.read_bytes(self.read_number("<Q")).decode(errors="replace")

    def read_value(self, value_type: int) -> Any:
        """Of arrays the first few items."""
        if value_type in SCALAR_FORMATS:
            return self.read_number(SCALAR_FORMATS[value_type])
        if value_type == STRING_TYPE:
            return self.read_string()
        item_type, count = self.read_number("<I"), self.read_number("<Q")
        if value_type != ARRAY_TYPE or (
            item_type not in SCALAR_FORMATS and item_type != STRING_TYPE
        ):
            raise CheckpointError(
                f"{self.path} holds metadata of an unknown type ({value_type}, {item_type}): it is damaged or of a later version."
            )
        items = [self.read_value(item_type) for _ in range(min(count, MAX_ARRAY_ITEMS))]
        if item_type in SCALAR_FORMATS:
            self.read_bytes((count - len(items)) * struct.calcsize(SCALAR_FORMATS[item_type]))
        else:
            for _ in range(count - len(items)):
                self.read_bytes(self.read_number("<Q"))
        return items


class GgufTensors(Tensors):
    """Open GGUF tensors; quantized ones are given as float32."""

    def read_values(self, location: TensorLocation) -> np.ndarray:
        if location.dtype in DTYPES_BY_CODE:
            return super().read_values(location)
        if location.nbytes == 0:
            return np.zeros(location.shape, np.float32)
        num_rows = prod(location.shape[:-1]) if _has_row_blocks(location) else 1
        return self.dequantize_rows(
            self.read_raw(location).reshape(num_rows, -1), location.dtype
        ).reshape(location.shape)

    def dequantize_rows(self, rows: np.ndarray, dtype: str) -> np.ndarray:
        """The values of rows of bytes."""
        try:
            return decode_gguf_values(rows, dtype)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path} holds values of type {dtype}, which the gguf package cannot expand: take another quantisation."
            ) from None

    def weight_format(self, key: str) -> str | None:
        return super().weight_format(key) if self.has_row_blocks(key) else None

    def has_row_blocks(self, key: str) -> bool:
        """Whether a tensor is quantized, and every row has blocks of its own."""
        return self.dtypes[key] not in DTYPES_BY_CODE and _has_row_blocks(self.locations[key])

    def read_quantized_rows(self, key: str) -> np.ndarray:
        """The stored bytes of a tensor that is `in_rows`."""
        location = self.locations[key]
        return self.read_raw(location).reshape(*location.shape[:-1], -1)

    def read_quantized(self, key: str) -> QuantizedTensor:
        *leading_axes, columns = self.locations[key].shape
        blocks = self.read_quantized_rows(key).reshape(
            *leading_axes, -1, 34
        )  # of Q8_0: a float16, then 32 numbers
        return QuantizedTensor(
            blocks[..., 2:].reshape(*leading_axes, columns).view(np.int8),
            blocks[..., :2].reshape(*leading_axes, -1).view(np.float16),
        )


def _has_row_blocks(location: TensorLocation) -> bool:
    """ComfyUI-GGUF folds axes together where blocks would not divide the last one."""
    return (
        bool(location.shape)
        and location.shape[-1] % import_gguf().GGML_QUANT_SIZES[ggml_type(location.dtype)][0] == 0
    )


def open_gguf(path: Path) -> GgufTensors:
    """The tensors of a GGUF file, in the order of axes of PyTorch. Raises CheckpointError when it is damaged."""
    with path.open("rb") as file:
        reader = _HeaderReader(path, file)
        reader.read_bytes(4)
        version, num_tensors, num_metadata = (
            reader.read_number("<I"),
            reader.read_number("<Q"),
            reader.read_number("<Q"),
        )
        if version not in (2, 3):
            raise CheckpointError(
                f"{path} is GGUF of version {version}, and 2 and 3 are read (little-endian ones): convert it anew."
            )
        metadata = {}
        for _ in range(num_metadata):
            key = reader.read_string()
            metadata[key] = reader.read_value(reader.read_number("<I"))
        tensor_infos = [_read_tensor_info(reader) for _ in range(num_tensors)]
        header_end = file.tell()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(
            f"{path} is aligned to {alignment}, which is no sensible number: it is damaged."
        )
    data_start = -(-header_end // alignment) * alignment
    locations: dict[str, TensorLocation] = {}
    previous_end = 0
    for name, shape, type_code, offset in sorted(
        tensor_infos, key=lambda tensor_info: tensor_info[3]
    ):
        dtype, size = _resolve_type(path, name, shape, type_code)
        if (
            (size and offset < previous_end)
            or data_start + offset + size > reader.size
            or name in locations
        ):
            raise CheckpointError(
                f"{path} is not a whole GGUF file: {name} overlaps another tensor or lies beyond the end."
            )
        previous_end = max(previous_end, offset + size)
        original_shape = metadata.get(f"{ORIGINAL_SHAPE_KEY}{name}", list(shape))
        is_valid_shape = (
            isinstance(original_shape, list)
            and all(isinstance(n, int) and n >= 0 for n in original_shape)
            and prod(original_shape) == prod(shape)
        )
        if not is_valid_shape:
            raise CheckpointError(
                f"{path} says that {name} has the shape {original_shape}, which does not fit its {list(shape)}: it is damaged."
            )
        locations[name] = TensorLocation(
            path, data_start + offset, size, tuple(original_shape), dtype
        )
    return GgufTensors(
        path, locations, {k: str(v) for k, v in metadata.items() if not isinstance(v, list)}
    )


def _read_tensor_info(reader: _HeaderReader) -> tuple[str, tuple[int, ...], int, int]:
    name, num_axes = reader.read_string(), reader.read_number("<I")
    if num_axes > MAX_AXES:
        raise CheckpointError(f"{reader.path} holds a tensor of {num_axes} axes: it is damaged.")
    shape = tuple(reader.read_number("<Q") for _ in range(num_axes))[::-1]
    return name, shape, reader.read_number("<I"), reader.read_number("<Q")


def _resolve_type(path: Path, name: str, shape: tuple[int, ...], type_code: int) -> tuple[str, int]:
    """The type's name and the bytes of the tensor."""
    if type_code in UNQUANTIZED_TYPES:
        return UNQUANTIZED_TYPES[type_code], prod(shape) * DTYPES_BY_CODE[
            UNQUANTIZED_TYPES[type_code]
        ].itemsize
    gguf = import_gguf()
    try:
        dtype = gguf.GGMLQuantizationType(type_code)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{path} holds {name} in a type ({type_code}) that the gguf package does not know: update it."
        ) from None
    if not shape or shape[-1] % block_size:
        raise CheckpointError(
            f"{path} holds {name} of shape {list(shape)} in blocks of {block_size}, which do not fit: it is damaged."
        )
    return dtype.name, prod(shape) // block_size * block_bytes


def write_gguf(
    path: str | Path,
    shapes: TensorShapes,
    dtypes: Mapping[str, str],
    read_tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
):
    """Writes `tensor(key)`, already `encoded`, for every key of `shapes`, in order, holding one at a time; whole or not at all.

    dtypes: float32, float16, bfloat16 or a quantized type of ggml for each. The architecture is `flux`, as ComfyUI-GGUF has no
    other name for Chroma's tensors.
    """
    gguf = import_gguf()
    path = Path(path)
    with replace_atomically(path) as temporary_path:
        writer = gguf.GGUFWriter(temporary_path, "flux")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            writer.add_string(key, value)
        required_bytes = 0
        for key, shape in shapes.items():
            quantization_type = ggml_type(dtypes[key])
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization_type]
            num_bytes = prod(shape) // block_size * block_bytes
            required_bytes += num_bytes + 256
            writer.add_tensor_info(
                key, shape, np.dtype(np.float32), num_bytes, raw_dtype=quantization_type
            )
        require_space(path.parent, required_bytes)
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for key in shapes:
                writer.write_tensor_data(read_tensor(key))


def encode_gguf_values(array: np.ndarray, dtype: str, key: str) -> np.ndarray:
    """`array` in a type of GGUF files; quantized ones as bytes."""
    if dtype in DTYPES:
        values = cast_array(array, DTYPES[dtype], key)
        return values.view(np.uint16) if dtype == "bfloat16" else values
    return import_gguf().quants.quantize(
        cast_array(array, DTYPES["float32"], key), ggml_type(dtype)
    )


def decode_gguf_values(array: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of `encoded` for quantized types, as float32."""
    return import_gguf().quants.dequantize(array, ggml_type(dtype))
