"""Files of named tensors: opened with one clear sentence when they cannot be, read and written tensor by tensor, never left by halves.

Reading is plain reading. A memory map would be shorter, but its pages count as resident memory, and a 19 GB file has many.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from radiance.base.errors import CheckpointError

TensorShapes = Mapping[str, tuple[int, ...]]

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
DTYPES_BY_CODE = {
    "F64": np.dtype(np.float64), "F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"],
    "F8_E4M3": DTYPES["float8_e4m3fn"], "F8_E5M2": DTYPES["float8_e5m2"], "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in DTYPES_BY_CODE.items()}
# Scaled fp8 and int8 files keep beside a weight what it is multiplied by; their other notes are for computing in fp8.
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
METADATA_SUFFIXES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
# What a matrix of a stored type can stay in memory as (`model/stored.py`): int8 where the file has scales of it.
WEIGHT_FORMATS_BY_CODE = {
    "Q8_0": "q8_0",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
MAX_AXES = 8  # of a tensor at most
FINGERPRINT_SAMPLE_BYTES = (
    16_384  # bytes, of which four are taken from every large tensor for a fingerprint
)


class TensorLocation(NamedTuple):
    """Where the values of a tensor lie."""

    file: Path
    offset: int
    nbytes: int  # bytes
    shape: tuple[int, ...]
    dtype: str  # as stored: F32, BF16, F8_E4M3, Q8_0, …


class QuantizedTensor(NamedTuple):
    """A matrix as a file keeps it small: numbers, and what those of a row, or of a block of it, are multiplied by."""

    values: np.ndarray  # [out, in], int8 or fp8
    scales: np.ndarray  # [out, in / block], float16 of Q8_0, or [out, 1], float32

    def is_finite(self) -> bool:
        max_value = (
            127 if self.values.dtype == np.int8 else float(ml_dtypes.finfo(self.values.dtype).max)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            return is_finite(self.values) and bool(
                np.isfinite(self.scales.astype(np.float32) * np.float32(max_value)).all()
            )

    def slice_axis(self, axis: int, begin: int, end: int) -> "QuantizedTensor":
        """Rows (axis 0) or inputs (axis 1), of the latter whole blocks."""
        if axis == 0:
            return QuantizedTensor(self.values[begin:end], self.scales[begin:end])
        if self.scales.shape[1] == 1:
            return QuantizedTensor(self.values[:, begin:end], self.scales)
        block_size = self.values.shape[1] // self.scales.shape[1]
        return QuantizedTensor(
            self.values[:, begin:end], self.scales[:, begin // block_size : end // block_size]
        )


class Tensors:
    """Open tensors: names, shapes and stored types without reading; values one at a time."""

    def __init__(
        self, path: Path, locations: Mapping[str, TensorLocation], metadata: Mapping[str, str]
    ):
        self.path, self.metadata, self.locations = path, metadata, dict(locations)
        self._scale_locations: dict[str, TensorLocation] = {}
        for key, location in locations.items():
            # What has no values may claim any shape; NumPy must be able to make it all the same.
            if (
                len(location.shape) > MAX_AXES
                or math.prod(max(1, n) for n in location.shape) >= 1 << 48
            ):
                raise CheckpointError(
                    f"{path} holds {key} of shape {list(location.shape)}: it is damaged."
                )
            weight_key = key[: key.rfind(".")] + ".weight"
            if key.endswith(SCALE_SUFFIXES) and weight_key in locations:
                self._scale_locations[weight_key] = self.locations.pop(key)
                leading_shape = locations[weight_key].shape[:1]
                if math.prod(location.shape) not in (1, *leading_shape):
                    raise CheckpointError(
                        f"{path} holds {key} of shape {list(location.shape)}, and one scale of all or of each of the {list(leading_shape)} rows is "
                        f"read: convert the file to BF16 first."
                    )
            if key.endswith(".comfy_quant") and _is_rotated(self.read_raw(location)):
                raise CheckpointError(
                    f"{path} holds {weight_key} rotated (ConvRot), which is not read: convert another file of the model."
                )
        self.locations = {
            k: loc for k, loc in self.locations.items() if not k.endswith(METADATA_SUFFIXES)
        }
        self.shapes: TensorShapes = {k: loc.shape for k, loc in self.locations.items()}
        self.dtypes: Mapping[str, str] = {k: loc.dtype for k, loc in self.locations.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        """The values, in their stored type; quantized and scaled ones as float32."""
        values = self.read_values(self.locations[key])
        if key not in self._scale_locations:
            return values
        scale = self.read_values(self._scale_locations[key]).astype(np.float32)
        scale = scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.size > 1 else scale.reshape(())
        return np.multiply(values, scale, dtype=np.float32)

    def weight_format(self, key: str) -> str | None:
        """As what a matrix stays in memory just as it is in the file; None for types of which there is no such thing."""
        code = self.dtypes[key]
        return (
            None
            if code == "I8" and key not in self._scale_locations
            else WEIGHT_FORMATS_BY_CODE.get(code)
        )

    def scale_shape(self, key: str) -> tuple[int, ...] | None:
        """Of the scales that lie beside a tensor: one number, or one of each row."""
        return self._scale_locations[key].shape if key in self._scale_locations else None

    def read_quantized(self, key: str) -> QuantizedTensor:
        """The values of a tensor that has a `store`, as they lie in the file."""
        values = self.read_values(self.locations[key])
        scales = (
            self.read_values(self._scale_locations[key]).astype(np.float32)
            if key in self._scale_locations
            else np.ones(1, np.float32)
        )
        return QuantizedTensor(values, np.broadcast_to(scales.reshape(-1, 1), (len(values), 1)))

    def fingerprint(self, keys: Mapping[str, str] | None = None) -> str:
        """A hash of all names, shapes, types and small tensors, and of samples of the large ones: 14 MB of a file of 10 GB.

        keys: the names to hash, and whose tensors they are; the file's own when None. Files of other containers have the same one when
        their tensors are stored alike.
        """
        digest = hashlib.blake2b(digest_size=16)
        keys = keys or {key: key for key in self.locations}
        named_locations = [
            (name, locations[key])
            for locations in (self.locations, self._scale_locations)
            for name, key in keys.items()
            if key in locations
        ]
        for name, location in sorted(named_locations, key=lambda pair: pair[0]):
            digest.update(repr((name, location.shape, location.dtype)).encode())
            is_small = location.nbytes <= 4 * FINGERPRINT_SAMPLE_BYTES
            for begin in (
                (0,)
                if is_small
                else np.linspace(0, location.nbytes - FINGERPRINT_SAMPLE_BYTES, 4).astype(int)
            ):
                digest.update(
                    np.fromfile(
                        location.file,
                        np.uint8,
                        location.nbytes if is_small else FINGERPRINT_SAMPLE_BYTES,
                        offset=location.offset + int(begin),
                    ).tobytes()
                )
        return digest.hexdigest()

    def read_values(self, location: TensorLocation) -> np.ndarray:
        if location.dtype not in DTYPES_BY_CODE:
            raise CheckpointError(
                f"{self.path} holds values of type {location.dtype}, which is not read: convert the file to BF16 first."
            )
        return self.read_raw(location).view(DTYPES_BY_CODE[location.dtype]).reshape(location.shape)

    def read_raw(self, location: TensorLocation) -> np.ndarray:
        """The stored bytes."""
        data = np.fromfile(location.file, np.uint8, location.nbytes, offset=location.offset)
        if len(data) < location.nbytes:
            raise CheckpointError(
                f"{location.file} became shorter while it was read: copy or download it again."
            )
        return data


def _is_rotated(metadata_bytes: np.ndarray) -> bool:
    """Whether ComfyUI's mark beside a matrix says that its inputs are rotated."""
    try:
        quantization = json.loads(metadata_bytes.tobytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(quantization, dict) and bool(quantization.get("convrot"))


def cast_array(array: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    """`array` as `dtype`. Raises CheckpointError when values are not finite, or would not be."""
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
    """Whether all values are finite; of bfloat16 by its bits, which is ten times as fast."""
    if array.dtype == DTYPES["bfloat16"]:
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all())


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
