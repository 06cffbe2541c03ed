"""Read GGUF files (ggml's format); write them for ComfyUI-GGUF and stable-diffusion.cpp.

The header is parsed here because the reader of the `gguf` package trusts every count in the file
and maps all of the file to memory. The package quantizes and dequantizes values.
"""

import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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

# struct formats by GGUF's codes of metadata types.
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
# ggml's codes of the types that NumPy has; the package knows the others.
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
MAX_ARRAY_ITEMS = 64  # that are kept of a metadata array; vocabularies are longer, and not needed
MAX_HEADER_SIZE = 100_000_000  # bytes, as in safetensors
MAX_ALIGNMENT = 1 << 20  # bytes
ORIGINAL_SHAPE_KEY = "comfy.gguf.orig_shape."  # ComfyUI-GGUF writes it when it merges axes
QUANTIZED_DTYPES = ("q8_0", "q4_0")  # that we quantize to; other stored types can only be copied
GGML_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
Q8_0_BLOCK_BYTES = 34  # a float16 scale and 32 int8 values


def import_gguf() -> Any:
    """Return the optional `gguf` package.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError(
            "Quantized GGUF files need the gguf package: pip install 'radiance[gguf]'."
        ) from None
    return gguf


def ggml_type(dtype: str) -> Any:
    """Return ggml's type for our name (bfloat16, q8_0) or for its own (BF16, Q8_0)."""
    return import_gguf().GGMLQuantizationType[GGML_NAMES.get(dtype, dtype.upper())]


# --- reading --------------------------------------------------------------------------------------


class GgufTensors(Tensors):
    """The tensors of an open GGUF file; quantized ones are returned as float32."""

    def read_values(self, location: TensorLocation) -> np.ndarray:
        """Return the values at a location, dequantized to float32 if necessary."""
        if location.dtype in DTYPES_BY_CODE:
            return super().read_values(location)
        if location.nbytes == 0:
            return np.zeros(location.shape, np.float32)
        num_rows = prod(location.shape[:-1]) if _has_row_blocks(location) else 1
        rows = self.read_raw(location).reshape(num_rows, -1)
        return self.dequantize_rows(rows, location.dtype).reshape(location.shape)

    def dequantize_rows(self, rows: np.ndarray, dtype: str) -> np.ndarray:
        """Return the values of rows of stored bytes.

        Raises:
            CheckpointError: If the gguf package cannot dequantize the type.
        """
        try:
            return decode_gguf_values(rows, dtype)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path} has values of type {dtype}, which the gguf package cannot "
                f"dequantize: use a file of another quantization."
            ) from None

    def weight_format(self, key: str) -> str | None:
        """Return the format in which a matrix can stay in memory exactly as stored, if any."""
        return super().weight_format(key) if self.has_row_blocks(key) else None

    def has_row_blocks(self, key: str) -> bool:
        """Return True if a tensor is quantized and no block extends over two rows."""
        return self.dtypes[key] not in DTYPES_BY_CODE and _has_row_blocks(self.locations[key])

    def read_quantized_rows(self, key: str) -> np.ndarray:
        """Return the stored bytes of a tensor that has row blocks: one row of bytes per row."""
        location = self.locations[key]
        return self.read_raw(location).reshape(*location.shape[:-1], -1)

    def read_quantized(self, key: str) -> QuantizedTensor:
        """Return a Q8_0 matrix as stored."""
        *leading_axes, num_columns = self.locations[key].shape
        blocks = self.read_quantized_rows(key).reshape(*leading_axes, -1, Q8_0_BLOCK_BYTES)
        return QuantizedTensor(
            values=blocks[..., 2:].reshape(*leading_axes, num_columns).view(np.int8),
            scales=blocks[..., :2].reshape(*leading_axes, -1).view(np.float16),
        )


def _has_row_blocks(location: TensorLocation) -> bool:
    """Return False where ComfyUI-GGUF merged axes because blocks would not divide the last one."""
    block_sizes = import_gguf().GGML_QUANT_SIZES
    return (
        bool(location.shape) and location.shape[-1] % block_sizes[ggml_type(location.dtype)][0] == 0
    )


def open_gguf(path: Path) -> GgufTensors:
    """Open the tensors of a GGUF file, with axes in the order of PyTorch.

    Raises:
        CheckpointError: If the file is damaged, or of an unsupported version.
    """
    header = _read_header(path)
    metadata = {k: str(v) for k, v in header.metadata.items() if not isinstance(v, list)}
    return GgufTensors(path, _locate_tensors(path, header), metadata)


class _TensorInfo(NamedTuple):
    """The entry of a tensor in a header."""

    name: str
    shape: tuple[int, ...]  # in the order of PyTorch
    type_code: int
    offset: int  # bytes from the start of the data


class _Header(NamedTuple):
    """The parsed header of a file."""

    metadata: dict[str, Any]
    tensors: list[_TensorInfo]
    size: int  # bytes, without the padding before the data


def _read_header(path: Path) -> _Header:
    """Parse the header of a file."""
    with path.open("rb") as file:
        reader = _HeaderReader(path, file)
        reader.read_bytes(4)  # the magic number
        version = reader.read_number("<I")
        num_tensors, num_metadata = reader.read_number("<Q"), reader.read_number("<Q")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path} is GGUF of version {version}, but only versions 2 and 3 (little-endian) "
                f"are supported: convert it again."
            )
        metadata = {}
        for _ in range(num_metadata):
            key = reader.read_string()
            metadata[key] = reader.read_value(reader.read_number("<I"))
        tensors = [_read_tensor_info(reader) for _ in range(num_tensors)]
        return _Header(metadata, tensors, file.tell())  # codespell:ignore tell


class _HeaderReader:
    """Numbers and texts of a header; reading stops with an error at the end of the file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.file = file
        self.remaining = min(path.stat().st_size, MAX_HEADER_SIZE)  # bytes

    def read_bytes(self, count: int) -> bytes:
        if count > self.remaining:
            raise CheckpointError(
                f"{self.path} is not a complete GGUF file: its header is truncated or damaged. "
                f"Copy or download it again."
            )
        self.remaining -= count
        data = self.file.read(count)
        if len(data) < count:
            raise CheckpointError(
                f"{self.path} is not a complete GGUF file: it ends inside its header. "
                f"Copy or download it again."
            )
        return data

    def read_number(self, struct_format: str) -> Any:
        return struct.unpack(struct_format, self.read_bytes(struct.calcsize(struct_format)))[0]

    def read_string(self) -> str:
        return self.read_bytes(self.read_number("<Q")).decode(errors="replace")

    def read_value(self, value_type: int) -> Any:
        """Return a metadata value, or only the first items if it is an array."""
        if value_type in SCALAR_FORMATS:
            return self.read_number(SCALAR_FORMATS[value_type])
        if value_type == STRING_TYPE:
            return self.read_string()
        item_type, count = self.read_number("<I"), self.read_number("<Q")
        is_known_item = item_type in SCALAR_FORMATS or item_type == STRING_TYPE
        if value_type != ARRAY_TYPE or not is_known_item:
            raise CheckpointError(
                f"{self.path} has metadata of an unknown type ({value_type}, {item_type}): it is "
                f"damaged or of a later version."
            )
        items = [self.read_value(item_type) for _ in range(min(count, MAX_ARRAY_ITEMS))]
        num_skipped = count - len(items)
        if item_type in SCALAR_FORMATS:
            self.read_bytes(num_skipped * struct.calcsize(SCALAR_FORMATS[item_type]))
        else:
            for _ in range(num_skipped):
                self.read_bytes(self.read_number("<Q"))
        return items


def _read_tensor_info(reader: _HeaderReader) -> _TensorInfo:
    name, num_axes = reader.read_string(), reader.read_number("<I")
    if num_axes > MAX_AXES:
        raise CheckpointError(f"{reader.path} has a tensor of {num_axes} axes: it is damaged.")
    shape = tuple(reader.read_number("<Q") for _ in range(num_axes))[::-1]
    return _TensorInfo(name, shape, reader.read_number("<I"), reader.read_number("<Q"))


def _locate_tensors(path: Path, header: _Header) -> dict[str, TensorLocation]:
    """Return the tensors' locations after a check that they fit into the file without overlaps."""
    alignment = header.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT:
        raise CheckpointError(f"{path} has an alignment of {alignment} bytes: it is damaged.")
    data_start = -(-header.size // alignment) * alignment
    file_size = path.stat().st_size
    locations: dict[str, TensorLocation] = {}
    previous_end = 0
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        dtype, size = _resolve_type(path, tensor)
        offset = data_start + tensor.offset
        overlaps = size and tensor.offset < previous_end
        if overlaps or offset + size > file_size or tensor.name in locations:
            raise CheckpointError(
                f"{path} is not a complete GGUF file: {tensor.name} overlaps another tensor or "
                f"extends beyond the end."
            )
        previous_end = max(previous_end, tensor.offset + size)
        shape = _original_shape(path, tensor, header.metadata)
        locations[tensor.name] = TensorLocation(path, offset, size, shape, dtype)
    return locations


def _original_shape(
    path: Path, tensor: _TensorInfo, metadata: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the shape that a tensor had before ComfyUI-GGUF merged axes."""
    original_shape = metadata.get(f"{ORIGINAL_SHAPE_KEY}{tensor.name}", list(tensor.shape))
    is_valid = (
        isinstance(original_shape, list)
        and all(isinstance(n, int) and n >= 0 for n in original_shape)
        and prod(original_shape) == prod(tensor.shape)
    )
    if not is_valid:
        raise CheckpointError(
            f"{path} gives {tensor.name} the original shape {original_shape}, which does not "
            f"match {list(tensor.shape)}: it is damaged."
        )
    return tuple(original_shape)


def _resolve_type(path: Path, tensor: _TensorInfo) -> tuple[str, int]:
    """Return the name of a tensor's type and the tensor's size in bytes."""
    if tensor.type_code in UNQUANTIZED_TYPES:
        dtype = UNQUANTIZED_TYPES[tensor.type_code]
        return dtype, prod(tensor.shape) * DTYPES_BY_CODE[dtype].itemsize
    gguf = import_gguf()
    try:
        quantization_type = gguf.GGMLQuantizationType(tensor.type_code)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization_type]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{path} has {tensor.name} in a type ({tensor.type_code}) that the gguf package does "
            f"not know: update the package."
        ) from None
    if not tensor.shape or tensor.shape[-1] % block_size:
        raise CheckpointError(
            f"{path} has {tensor.name} of shape {list(tensor.shape)}, which blocks of "
            f"{block_size} do not divide: it is damaged."
        )
    return quantization_type.name, prod(tensor.shape) // block_size * block_bytes


# --- writing --------------------------------------------------------------------------------------


def write_gguf(
    path: str | Path,
    shapes: TensorShapes,
    dtypes: Mapping[str, str],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
):
    """Write tensors as an iterator yields them, holding one at a time.

    The architecture is `flux`, because ComfyUI-GGUF has no other name for Chroma's tensors.

    Args:
        path: The file. It appears under its name only when it is complete.
        shapes: Shape of every tensor, in the order of the file.
        dtypes: float32, float16, bfloat16 or a quantized type of ggml for every tensor.
        tensors: Names and encoded values (see `encode_gguf_values`) in the order of `shapes`.
        metadata: Text metadata.

    Raises:
        OutputError: If the file cannot be written, for instance because the disk is full.
    """
    gguf = import_gguf()
    path = Path(path)
    with replace_atomically(path) as temp_path:
        writer = gguf.GGUFWriter(temp_path, "flux")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            writer.add_string(key, value)
        required_bytes = 0
        for key, shape in shapes.items():
            quantization_type = ggml_type(dtypes[key])
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization_type]
            num_bytes = prod(shape) // block_size * block_bytes
            required_bytes += num_bytes + 256  # and the entry in the header
            writer.add_tensor_info(
                key, shape, np.dtype(np.float32), num_bytes, raw_dtype=quantization_type
            )
        require_space(path.parent, required_bytes)
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            stream = iter(tensors)
            for key in shapes:
                name, values = next(stream)
                if name != key:
                    raise AssertionError(f"Expected the tensor {key}, not {name}.")
                writer.write_tensor_data(values)


def encode_gguf_values(array: np.ndarray, dtype: str, key: str) -> np.ndarray:
    """Return values in a type of GGUF files.

    Args:
        array: Values of a tensor.
        dtype: One of our types, or a quantized type, whose values are returned as bytes.
        key: Name of the tensor in errors.

    Raises:
        CheckpointError: If values are not finite, or too large for the type.
    """
    if dtype in DTYPES:
        values = cast_array(array, DTYPES[dtype], key)
        return values.view(np.uint16) if dtype == "bfloat16" else values
    values = cast_array(array, DTYPES["float32"], key)
    return import_gguf().quants.quantize(values, ggml_type(dtype))


def decode_gguf_values(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return the float32 values of quantized bytes: the inverse of `encode_gguf_values`."""
    return import_gguf().quants.dequantize(array, ggml_type(dtype))
