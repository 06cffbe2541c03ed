"""Choose the type in which a tensor is written, and copy or round its values to it."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from radiance.base.errors import CheckpointError
from radiance.model.quantized import Q8_0_BLOCK, quantize_matrix
from radiance.weights import native
from radiance.weights.checkpoint import Checkpoint, FileTensors
from radiance.weights.gguf import (
    QUANTIZED_DTYPES,
    GgufTensors,
    decode_gguf_values,
    encode_gguf_values,
)
from radiance.weights.tensors import DTYPES, cast_array, is_finite

CHUNK_SIZE = 1 << 18  # values that are rounded at once: their float32 values fit in a core's cache
MapChunks = Callable[..., Iterator]  # `map`, or that of a pool of threads


class WrittenTensor(NamedTuple):
    """A tensor as it is written to a file, and the error of its rounding."""

    name: str
    values: np.ndarray
    scales: np.ndarray | None = None  # of the rows
    sum_squares: float = 0.0  # of the values that were rounded; 0 if they are exact
    sum_squared_errors: float = 0.0


def choose_dtype(
    name: str,
    shape: tuple[int, ...],
    stored_dtype: str,
    dtype: str | None,
    is_gguf: bool,
    copyable_format: str | None = None,
) -> str:
    """Return the type in which a tensor is written, which is never too coarse for it.

    Args:
        name: Native name.
        shape: Shape of the tensor.
        stored_dtype: Type in which the tensor is stored now (F32, BF16, …).
        dtype: The requested type, or None to keep the tensor's own.
        is_gguf: The target is a GGUF file, in which all but the weights of linear layers are
            float32.
        copyable_format: The tensor's own quantized type, if it can be copied.
    """
    if native.is_float32_tensor(name) or (is_gguf and not _is_linear_weight(name, shape)):
        return "float32"
    if dtype is None:
        plain_dtypes = {"F32": "float32", "F64": "float32", "F16": "float16"}
        return copyable_format or plain_dtypes.get(stored_dtype, "bfloat16")
    if dtype in QUANTIZED_DTYPES:
        is_divisible = shape[-1] % Q8_0_BLOCK == 0
        return dtype if native.is_quantizable(name) and is_divisible else "bfloat16"
    if dtype == "int8" or DTYPES[dtype].itemsize == 1:
        return dtype if native.is_quantizable(name) else "bfloat16"
    return dtype


def _is_linear_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Return True for the matrix of a linear layer.

    ComfyUI-GGUF decodes only weights of layers when they are used. Before that, BF16 and quantized
    tensors are arrays of bytes. ComfyUI would take the number of bytes in a row of `img_in_patch`
    for the patch size, and could not load a parameter outside a layer.
    """
    return name.endswith(".weight") and len(shape) == 2


def find_copyable_format(checkpoint: Checkpoint, name: str, export_format: str) -> str | None:
    """Return the quantized type of a tensor if the target can store it bit for bit.

    GGUF files can store any quantized type of a GGUF file. Safetensors files can store int8 and
    fp8; scales need a native file.

    Args:
        checkpoint: The source.
        name: Native name.
        export_format: native, diffusers, gguf or torch.
    """
    tensors = checkpoint.file_tensors
    if tensors is None or name not in tensors.keys:
        return None
    if export_format == "gguf":
        key, *other_keys = tensors.keys[name]
        can_copy = (
            isinstance(tensors.file, GgufTensors)
            and not other_keys
            and tensors.file.has_row_blocks(key)
        )
        return checkpoint.dtypes[name].lower() if can_copy else None
    weight_format = tensors.weight_format(name)
    has_scales = any(tensors.file.scale_shape(key) is not None for key in tensors.keys[name])
    if weight_format == "q8_0" or (has_scales and export_format != "native"):
        return None
    return weight_format


def export_scale_shape(checkpoint: Checkpoint, name: str, is_copy: bool) -> tuple[int, ...] | None:
    """Return the shape of the scales of an int8 or fp8 matrix in a native file.

    Args:
        checkpoint: The source.
        name: Native name.
        is_copy: The matrix is copied; it keeps its own scales if the source has it as one tensor.
            Otherwise every row has a scale. ComfyUI recognizes scales of rows by their two axes.
    """
    tensors = checkpoint.file_tensors
    if is_copy and tensors is not None:
        keys = tensors.keys[name]
        scale_shapes = [
            shape for key in keys if (shape := tensors.file.scale_shape(key)) is not None
        ]
        if not scale_shapes:
            return None
        if len(keys) == 1 and math.prod(scale_shapes[0]) == 1:
            return scale_shapes[0]
    return (checkpoint.shapes[name][0], 1)


def copy_tensor(
    tensors: FileTensors, name: str, export_format: str, scale_shape: tuple[int, ...] | None
) -> WrittenTensor:
    """Return a quantized tensor exactly as stored.

    Args:
        tensors: The source.
        name: Native name.
        export_format: native, diffusers, gguf or torch.
        scale_shape: Shape of the scales in the target; None without scales.

    Raises:
        CheckpointError: If values are not finite.
    """
    if export_format == "gguf" and isinstance(tensors.file, GgufTensors):
        (key,) = tensors.keys[name]
        result = WrittenTensor(name, tensors.file.read_quantized_rows(key))
        dtype = tensors.file.dtypes[key]
        chunks = _split_chunks(result.values)
        is_valid = all(is_finite(tensors.file.dequantize_rows(chunk, dtype)) for chunk in chunks)
    else:
        quantized = tensors.read_quantized(name)
        scales = None
        if scale_shape is not None:
            scales = quantized.scales[: math.prod(scale_shape)].reshape(scale_shape)
        result = WrittenTensor(name, quantized.values, scales)
        is_valid = quantized.is_finite()
    if not is_valid:
        raise CheckpointError(
            f"{name} holds values that are not finite: the file it comes from is damaged."
        )
    return result


def round_tensor(
    values: np.ndarray, dtype: str, name: str, is_gguf: bool, map_chunks: MapChunks = map
) -> WrittenTensor:
    """Return values in another type, rounded a few rows at a time.

    Args:
        values: Values of a tensor.
        dtype: The type to round to.
        name: Native name.
        is_gguf: Values are encoded for a GGUF file.
        map_chunks: Applies a function to chunks of rows, perhaps in threads.

    Raises:
        CheckpointError: If values are not finite, or too large for the type.
    """
    if is_exact_cast(values.dtype, dtype):
        return WrittenTensor(name, _encode(values, dtype, name, is_gguf))
    round_chunk = partial(_round_chunk, dtype=dtype, name=name, is_gguf=is_gguf)
    chunks = list(map_chunks(round_chunk, _split_chunks(values)))
    scales = [chunk.scales for chunk in chunks if chunk.scales is not None]
    return WrittenTensor(
        name,
        np.concatenate([chunk.values for chunk in chunks]),
        np.concatenate(scales) if scales else None,
        sum(chunk.sum_squares for chunk in chunks),
        sum(chunk.sum_squared_errors for chunk in chunks),
    )


def _round_chunk(values: np.ndarray, dtype: str, name: str, is_gguf: bool) -> WrittenTensor:
    """Return a few rows in another type, and the error of rounding them."""
    scales = None
    if dtype == "int8":  # one scale per row
        transposed = cast_array(values, DTYPES["float32"], name).T
        encoded, scales = (x.T for x in quantize_matrix(transposed, "int8"))
        decoded = encoded * scales
    else:
        encoded = _encode(values, dtype, name, is_gguf)
        if dtype in QUANTIZED_DTYPES:
            decoded = decode_gguf_values(encoded, dtype)
        else:
            decoded = encoded.view(DTYPES[dtype]).astype(np.float32)
    exact = values.astype(np.float32)
    return WrittenTensor(name, encoded, scales, _sum_squares(exact), _sum_squares(exact - decoded))


def _encode(values: np.ndarray, dtype: str, name: str, is_gguf: bool) -> np.ndarray:
    """Return values as the writer of the target expects them."""
    if is_gguf:
        return encode_gguf_values(values, dtype, name)
    return cast_array(values, DTYPES[dtype], name)


def _sum_squares(x: np.ndarray) -> float:
    return float(np.vdot(x, x))


def is_exact_cast(source_dtype: np.dtype, target_dtype: str) -> bool:
    """Return True if the cast rounds no value.

    Args:
        source_dtype: NumPy type of the values.
        target_dtype: Name of a type; quantized types are never exact.
    """
    if target_dtype not in DTYPES:
        return False
    is_widened = target_dtype == "float32" and np.can_cast(source_dtype, np.float32)
    return source_dtype == DTYPES[target_dtype] or is_widened


def _split_chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a few rows at a time, so that the largest matrices are never in float32 as a whole."""
    chunk_rows = max(1, CHUNK_SIZE // max(1, math.prod(values.shape[1:])))
    return (values[begin : begin + chunk_rows] for begin in range(0, len(values), chunk_rows))
