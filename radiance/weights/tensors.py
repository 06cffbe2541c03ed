"""Read files of named tensors: shapes and types at once, values one tensor at a time.

Values are read with ordinary reads. A memory map would be shorter, but its pages count as resident
memory, and a 19 GB file has many of them.
"""

import hashlib
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from radiance.base.errors import CheckpointError
from radiance.weights.quantization import (
    UnsupportedQuantizationError,
    check_note,
    find_unsupported_format,
    read_notes,
    rotate_inputs,
)

TensorShapes = Mapping[str, tuple[int, ...]]

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# The bits that are all set in values that are not finite, and in no others.
NONFINITE_BITS = {
    DTYPES["bfloat16"]: np.uint16(0x7F80),
    DTYPES["float16"]: np.uint16(0x7C00),
    DTYPES["float8_e4m3fn"]: np.uint8(0x7F),
    DTYPES["float8_e5m2"]: np.uint8(0x7C),
}
FINITE_CHUNK_SIZE = 1 << 18  # values that are tested at once: they fit in a core's cache
# Dtypes by the codes of safetensors headers.
DTYPES_BY_CODE = {
    "F64": np.dtype(np.float64),
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E5M2": DTYPES["float8_e5m2"],
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES_BY_CODE.items()}
# Scaled fp8 and int8 files store the scales of a weight in a tensor of its own. Their other extra
# tensors are notes, and hints for computing in fp8, which we do not do.
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
NOTE_SUFFIX = ".comfy_quant"
METADATA_SUFFIXES = (".scale_input", ".input_scale", NOTE_SUFFIX, "scaled_fp8")
MAX_NOTE_BYTES = 65_536
SCALE_CODES = ("F64", "F32", "F16", "BF16")
INTEGER_CODES = re.compile(r"[IU]\d+|BOOL")
# The formats in which matrices of a stored type stay in memory without being rounded again. They
# are those of config.WEIGHT_FORMATS, and float8_e5m2, which we read but do not make.
WEIGHT_FORMATS_BY_CODE = {
    "Q8_0": "q8_0",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
COMFYUI_PREFIX = "model.diffusion_model."
MAX_NAME_PARTS = 16  # of a layer's name in a note
MAX_AXES = 8
MAX_ELEMENTS = 1 << 48  # of one tensor
FINGERPRINT_SAMPLE_BYTES = 16_384  # of each of the four samples of a large tensor


class TensorLocation(NamedTuple):
    """The place of a tensor's values in a file."""

    file: Path
    offset: int  # bytes
    nbytes: int
    shape: tuple[int, ...]
    dtype: str  # as stored: F32, BF16, F8_E4M3, Q8_0, …


class QuantizedTensor(NamedTuple):
    """A quantized matrix: values, and the scales of its rows or of blocks of its rows."""

    values: np.ndarray  # [out, in], int8 or fp8
    scales: np.ndarray  # [out, in / block], float16 for Q8_0; or [out, 1], float32

    def is_finite(self) -> bool:
        """Return True if all values are finite after multiplication by their scales."""
        max_value = (
            127 if self.values.dtype == np.int8 else float(ml_dtypes.finfo(self.values.dtype).max)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            max_values = self.scales.astype(np.float32) * np.float32(max_value)
        return is_finite(self.values) and bool(np.isfinite(max_values).all())

    def slice_axis(self, axis: int, begin: int, end: int) -> "QuantizedTensor":
        """Return a range of rows (axis 0) or inputs (axis 1).

        Args:
            axis: 0 or 1.
            begin: First index of the range.
            end: Index after the last one. A range of inputs must contain complete blocks.
        """
        if axis == 0:
            return QuantizedTensor(self.values[begin:end], self.scales[begin:end])
        if self.scales.shape[1] == 1:
            return QuantizedTensor(self.values[:, begin:end], self.scales)
        block_size = self.values.shape[1] // self.scales.shape[1]
        return QuantizedTensor(
            self.values[:, begin:end], self.scales[:, begin // block_size : end // block_size]
        )


class Tensors:
    """The tensors of an open file: names, shapes and stored types; values are read on demand.

    Args:
        path: The file (or index) that errors name.
        locations: Location of every tensor. Scales and hints of quantized matrices are not listed
            among the tensors.
        metadata: Text metadata of the file.

    Attributes:
        problem: Why values cannot be read, if the weights are quantized in an unsupported way. Such
            a file can still be described.

    Raises:
        CheckpointError: If a shape is impossible.
    """

    def __init__(
        self, path: Path, locations: Mapping[str, TensorLocation], metadata: Mapping[str, str]
    ):
        self.path = path
        self.metadata = metadata
        for key, location in locations.items():
            self._check_shape(key, location)
        scale_keys = [
            key
            for key in locations
            if key.endswith(SCALE_SUFFIXES) and _weight_key(key) in locations
        ]
        self._scale_locations = {_weight_key(key): locations[key] for key in scale_keys}
        self._rotation_sizes: dict[str, int] = {}  # of weights whose inputs are rotated
        self.problem: str | None = None
        try:
            if len(self._scale_locations) < len(scale_keys):
                raise UnsupportedQuantizationError("has weights with two scales")
            for key in scale_keys:
                _check_scales(key, locations[key], locations[_weight_key(key)])
            self._read_notes(locations)
        except UnsupportedQuantizationError as error:
            self.problem = str(error)
        if unsupported_format := find_unsupported_format(locations):
            self.problem = f"is quantized: it has the tensors of {unsupported_format}"
        self.locations = {
            key: location
            for key, location in locations.items()
            if key not in scale_keys and not key.endswith(METADATA_SUFFIXES)
        }
        self.shapes: TensorShapes = {k: loc.shape for k, loc in self.locations.items()}
        self.dtypes: Mapping[str, str] = {k: loc.dtype for k, loc in self.locations.items()}

    def _check_shape(self, key: str, location: TensorLocation):
        """Reject shapes that NumPy cannot make, which damaged headers have for empty tensors."""
        num_elements = math.prod(max(1, n) for n in location.shape)
        if len(location.shape) > MAX_AXES or num_elements >= MAX_ELEMENTS:
            raise CheckpointError(
                f"{self.path} has a tensor {key} of shape {list(location.shape)}: it is damaged."
            )

    def _read_notes(self, locations: Mapping[str, TensorLocation]):
        """Read the descriptions of quantized layers, and compare them with the weights."""
        tensor_notes = {}
        for key, location in locations.items():
            if key.endswith(NOTE_SUFFIX):
                if location.nbytes > MAX_NOTE_BYTES:
                    raise UnsupportedQuantizationError(f"has {location.nbytes} bytes in {key}")
                tensor_notes[key.removesuffix(NOTE_SUFFIX)] = self.read_raw(location).tobytes()
        for layer, note in read_notes(tensor_notes, self.metadata).items():
            key = _find_weight_key(layer, locations)
            if key is None:
                raise UnsupportedQuantizationError(f"describes {layer}, which it does not contain")
            check_note(layer, note, locations[key].shape, locations[key].dtype)
            if note.rotation_size:
                self._rotation_sizes[key] = note.rotation_size

    def require_readable(self):
        """Raise CheckpointError if the weights are quantized in an unsupported way."""
        if self.problem is not None:
            raise CheckpointError(
                f"{self.path} {self.problem}, which is not supported: use the original, or a file "
                f"in BF16, GGUF, int8 or fp8."
            )

    def require_weights(self, keys: Iterable[str]):
        """Check that tensors are weights: floats, or int8 with scales.

        Args:
            keys: Names of the tensors.

        Raises:
            CheckpointError: If they are integers, but not int8 with scales.
        """
        for key in keys:
            code = self.dtypes[key]
            is_int8 = code == "I8" and key in self._scale_locations
            if INTEGER_CODES.fullmatch(code) and not is_int8:
                reason = "are packed" if key in self._scale_locations else "have no scales"
                raise CheckpointError(
                    f"{self.path} has {key} as integers ({code}) that {reason}, so that its values "
                    f"are not known: use another file of the model."
                )

    def __getitem__(self, key: str) -> np.ndarray:
        """Return the values in their stored type; quantized and scaled ones as float32."""
        values = self.read_values(self.locations[key])
        if key in self._scale_locations:
            scale = self.read_values(self._scale_locations[key]).astype(np.float32)
            axes = (-1, *[1] * (values.ndim - 1)) if scale.size > 1 else ()
            values = np.multiply(values, scale.reshape(axes), dtype=np.float32)
        if key in self._rotation_sizes:
            values = rotate_inputs(values.astype(np.float32), self._rotation_sizes[key])
        return values

    def weight_format(self, key: str) -> str | None:
        """Return the format in which a matrix can stay in memory exactly as stored, if any."""
        code = self.dtypes[key]
        if key in self._rotation_sizes or (code == "I8" and key not in self._scale_locations):
            return None
        return WEIGHT_FORMATS_BY_CODE.get(code)

    def scale_shape(self, key: str) -> tuple[int, ...] | None:
        """Return the shape of a weight's scales: one number, or one per row; None without any."""
        return self._scale_locations[key].shape if key in self._scale_locations else None

    def read_quantized(self, key: str) -> QuantizedTensor:
        """Return a matrix that has a weight format, as stored."""
        values = self.read_values(self.locations[key])
        scales = np.ones(1, np.float32)
        if key in self._scale_locations:
            scales = self.read_values(self._scale_locations[key]).astype(np.float32)
        return QuantizedTensor(values, np.broadcast_to(scales.reshape(-1, 1), (len(values), 1)))

    def fingerprint(self, keys: Mapping[str, str] | None = None) -> str:
        """Return a hash of names, shapes, types, small tensors, and samples of large tensors.

        It reads 14 MB of a file of 10 GB. Files of different containers that store their tensors
        alike have the same fingerprint.

        Args:
            keys: The file's key for every name that is hashed; by default all of the file's own.
        """
        keys = keys or {key: key for key in self.locations}
        named_locations = [
            (name, locations[key])
            for locations in (self.locations, self._scale_locations)
            for name, key in keys.items()
            if key in locations
        ]
        digest = hashlib.blake2b(digest_size=16)
        for name, location in sorted(named_locations, key=lambda pair: pair[0]):
            digest.update(repr((name, location.shape, location.dtype)).encode())
            for begin, count in _sample_ranges(location.nbytes):
                offset = location.offset + begin
                sample = np.fromfile(location.file, np.uint8, count, offset=offset)
                digest.update(sample.tobytes())
        if self._rotation_sizes:
            digest.update(repr(sorted(self._rotation_sizes.items())).encode())
        return digest.hexdigest()

    def read_values(self, location: TensorLocation) -> np.ndarray:
        """Return the values at a location of this file, without their scales."""
        if location.dtype not in DTYPES_BY_CODE:
            raise CheckpointError(
                f"{self.path} has values of type {location.dtype}, which is not supported: convert "
                f"the file to BF16 first."
            )
        return self.read_raw(location).view(DTYPES_BY_CODE[location.dtype]).reshape(location.shape)

    def read_raw(self, location: TensorLocation) -> np.ndarray:
        """Return the stored bytes at a location of this file."""
        data = np.fromfile(location.file, np.uint8, location.nbytes, offset=location.offset)
        if len(data) < location.nbytes:
            raise CheckpointError(
                f"{location.file} became shorter while it was read: copy or download it again."
            )
        return data


def _weight_key(key: str) -> str:
    """Return the weight that a tensor with one of the suffixes above belongs to."""
    return key[: key.rfind(".")] + ".weight"


def _find_weight_key(layer: str, keys: Container[str]) -> str | None:
    """Return the weight of a layer; its name may have other prefixes in notes than in the file."""
    parts = f"{layer}.weight".split(".")[-MAX_NAME_PARTS:]
    suffixes = (".".join(parts[i:]) for i in range(len(parts) - 1))
    names = (f"{prefix}{suffix}" for suffix in suffixes for prefix in ("", COMFYUI_PREFIX))
    return next((name for name in names if name in keys), None)


def _check_scales(key: str, scales: TensorLocation, weight: TensorLocation):
    """Reject scales of anything but the complete weight or its rows."""
    row_axes = (weight.shape[0], *[1] * (len(scales.shape) - 1)) if weight.shape else ()
    is_supported_shape = math.prod(scales.shape) == 1 or scales.shape == row_axes
    if not is_supported_shape or scales.dtype not in SCALE_CODES:
        raise UnsupportedQuantizationError(
            f"has scales {key} of shape {list(scales.shape)} and type {scales.dtype}, where only "
            f"one number, or one for each of the {list(weight.shape[:1])} rows, can be read"
        )


def _sample_ranges(nbytes: int) -> list[tuple[int, int]]:
    """Return the (begin, count) byte ranges of a tensor that its fingerprint hashes."""
    if nbytes <= 4 * FINGERPRINT_SAMPLE_BYTES:
        return [(0, nbytes)]
    begins = np.linspace(0, nbytes - FINGERPRINT_SAMPLE_BYTES, 4).astype(int)
    return [(int(begin), FINGERPRINT_SAMPLE_BYTES) for begin in begins]


def cast_array(array: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    """Return an array in another type.

    Args:
        array: The values.
        dtype: The type to cast to.
        key: Name of the tensor in errors.

    Raises:
        CheckpointError: If values are not finite, before or after the cast.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype, copy=False)
    if not is_finite(result):
        if not is_finite(array):
            raise CheckpointError(
                f"{key} holds values that are not finite: the file it comes from is damaged."
            )
        raise CheckpointError(
            f"{key} has values that {dtype} cannot hold: write it in float32 or bfloat16."
        )
    return result


def is_finite(array: np.ndarray) -> bool:
    """Return True if all values are finite."""
    if array.dtype.kind in "iub":
        return True
    is_contiguous = array.flags.c_contiguous or array.flags.f_contiguous
    chunks = [array]
    if is_contiguous and array.size > FINITE_CHUNK_SIZE:
        values = array.ravel(order="K")
        chunks = (
            values[begin : begin + FINITE_CHUNK_SIZE]
            for begin in range(0, values.size, FINITE_CHUNK_SIZE)
        )
    return all(map(_is_chunk_finite, chunks))


def _is_chunk_finite(array: np.ndarray) -> bool:
    """Return True if all values are finite. Testing bits is ten times as fast as `np.isfinite`."""
    if array.dtype not in NONFINITE_BITS:
        return bool(np.isfinite(array).all())
    bits = NONFINITE_BITS[array.dtype]
    return not ((array.view(bits.dtype) & bits) == bits).any()


def concatenated_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of tensors concatenated along axis 0.

    Args:
        shapes: At least one shape.

    Returns:
        The shape of the result.

    Raises:
        CheckpointError: The shapes differ in another axis.
    """
    if len(shapes) == 1:
        return shapes[0]
    if any(shape[1:] != shapes[0][1:] or not shape for shape in shapes):
        shapes_text = ", ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(
            f"The checkpoint has parts of one matrix whose shapes do not fit: {shapes_text}. "
            "Copy or download it again."
        )
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def concatenate_arrays(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays concatenated along axis 0; a single array is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
