"""In what type a tensor is written: copied where its file has it so already, rounded else, and how far off that is."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from radiance.base.errors import CheckpointError
from radiance.model.quantized import Q8_0_BLOCK, quantize
from radiance.weights.checkpoint import Checkpoint, FileTensors
from radiance.weights.detect import MARKERS
from radiance.weights.gguf import (
    QUANTIZED_DTYPES,
    GgufTensors,
    decode_gguf_values,
    encode_gguf_values,
)
from radiance.weights.tensors import DTYPES, cast_array, is_finite

# What may be stored coarsely. All else is a small share of the weights and a large one of the damage: norms, biases, input and
# text projections, the approximator, everything NeRF.
BLOCK_MATRIX = re.compile(
    r"((text|double)_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])\.weight$"
)
CHUNK_SIZE = 1 << 22  # values that are rounded at a time: the largest matrix has 151 million


class WrittenTensor(NamedTuple):
    """A tensor as it goes into a file."""

    values: np.ndarray
    scales: np.ndarray | None = None  # that its rows are multiplied by
    sum_squares: float = 0.0  # the sum of the squares of what was rounded
    sum_squared_errors: float = 0.0  # and of what that changed


def choose_dtype(
    name: str,
    shape: tuple[int, ...],
    file_dtype: str,
    dtype: str | None,
    is_gguf: bool,
    copyable_format: str | None = None,
) -> str:
    """The type in which a tensor is written: `dtype`, or its own when None, but never one that is too coarse for it.

    small: its own type where that is `copyable`.
    """
    if name in MARKERS or name.startswith("nerf_image_embedder.") or (is_gguf and len(shape) == 1):
        return "float32"
    if dtype is None:
        return copyable_format or {"F32": "float32", "F64": "float32", "F16": "float16"}.get(
            file_dtype, "bfloat16"
        )
    if dtype in QUANTIZED_DTYPES:
        return dtype if BLOCK_MATRIX.match(name) and shape[-1] % Q8_0_BLOCK == 0 else "bfloat16"
    if dtype == "int8" or DTYPES[dtype].itemsize == 1:
        return dtype if BLOCK_MATRIX.match(name) else "bfloat16"
    return dtype


def find_copyable_format(checkpoint: Checkpoint, name: str, export_format: str) -> str | None:
    """The small type that a tensor has in its file, if a file of the format `to` can have it bit for bit.

    Quantized tensors stay what they are from GGUF to GGUF. Among safetensors int8 and fp8 do, with scales in native files alone.
    """
    tensors = checkpoint.get_tensor
    if not isinstance(tensors, FileTensors) or name not in tensors.keys:
        return None
    if export_format == "gguf":
        key, *other_keys = tensors.keys[name]
        has_row_blocks = (
            isinstance(tensors.file, GgufTensors)
            and not other_keys
            and tensors.file.has_row_blocks(key)
        )
        return checkpoint.dtypes[name].lower() if has_row_blocks else None
    weight_format = checkpoint.weight_format(name)
    has_scales = any(tensors.file.scale_shape(key) is not None for key in tensors.keys[name])
    return (
        None
        if weight_format == "q8_0" or (has_scales and export_format != "native")
        else weight_format
    )


def export_scale_shape(checkpoint: Checkpoint, name: str, is_copy: bool) -> tuple[int, ...] | None:
    """Of the scales beside a matrix of int8 or fp8 in a native file: one of each row, unless a copied one has but one in all."""
    row_scale_shape = (checkpoint.shapes[name][0], 1)
    if not is_copy:
        return row_scale_shape
    file_scale_shapes = [
        checkpoint.get_tensor.file.scale_shape(key) for key in checkpoint.get_tensor.keys[name]
    ]
    return (
        file_scale_shapes[0]
        if len(file_scale_shapes) == 1 or not any(shape is not None for shape in file_scale_shapes)
        else row_scale_shape
    )


def copy_tensor(checkpoint: Checkpoint, name: str, export_format: str) -> WrittenTensor:
    """A `copyable` tensor. Raises CheckpointError when values are not finite."""
    tensors = checkpoint.get_tensor
    if export_format == "gguf":
        result = WrittenTensor(tensors.file.read_quantized_rows(tensors.keys[name][0]))
        is_valid = all(
            is_finite(tensors.file.dequantize_rows(chunk, checkpoint.dtypes[name]))
            for chunk in _split_chunks(result.values)
        )
    else:
        quantized, shape = (
            tensors.read_quantized(name),
            export_scale_shape(checkpoint, name, is_copy=True),
        )
        result = WrittenTensor(
            quantized.values,
            None if shape is None else quantized.scales[: math.prod(shape)].reshape(shape),
        )
        is_valid = quantized.is_finite()
    if not is_valid:
        raise CheckpointError(
            f"{name} holds values that are not finite: the file it comes from is damaged."
        )
    return result


def round_tensor(values: np.ndarray, dtype: str, name: str, is_gguf: bool) -> WrittenTensor:
    """Values in a type, a few rows at a time. Raises CheckpointError when they are not finite, or would not be."""
    if is_exact_cast(values.dtype, dtype):
        return WrittenTensor(
            encode_gguf_values(values, dtype, name)
            if is_gguf
            else cast_array(values, DTYPES[dtype], name)
        )
    chunks = [_round_chunk(chunk, dtype, name, is_gguf) for chunk in _split_chunks(values)]
    scales = (
        None if chunks[0].scales is None else np.concatenate([chunk.scales for chunk in chunks])
    )
    sum_squares, sum_squared_errors = (
        sum(chunk.sum_squares for chunk in chunks),
        sum(chunk.sum_squared_errors for chunk in chunks),
    )
    return WrittenTensor(
        np.concatenate([chunk.values for chunk in chunks]), scales, sum_squares, sum_squared_errors
    )


def _round_chunk(values: np.ndarray, dtype: str, name: str, is_gguf: bool) -> WrittenTensor:
    scales = None
    if dtype == "int8":
        rounded_values, scales = (
            x.T for x in quantize(cast_array(values, DTYPES["float32"], name).T, "int8")
        )
        decoded_values = rounded_values * scales
    else:
        rounded_values = (
            encode_gguf_values(values, dtype, name)
            if is_gguf
            else cast_array(values, DTYPES[dtype], name)
        )
        decoded_values = (
            decode_gguf_values(rounded_values, dtype)
            if dtype in QUANTIZED_DTYPES
            else rounded_values.view(DTYPES[dtype]).astype(np.float32)
        )
    float32_values = values.astype(np.float32)
    return WrittenTensor(
        rounded_values,
        scales,
        _sum_squares(float32_values),
        _sum_squares(float32_values - decoded_values),
    )


def _sum_squares(x: np.ndarray) -> float:
    return float(np.vdot(x, x))


def is_exact_cast(source_dtype: np.dtype, target_dtype: str) -> bool:
    """Whether no value can be rounded on the way."""
    return target_dtype in DTYPES and (
        source_dtype == DTYPES[target_dtype]
        or (target_dtype == "float32" and np.can_cast(source_dtype, np.float32))
    )


def _split_chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Few rows at a time, so that the largest matrices are never held in float32."""
    chunk_rows = max(1, CHUNK_SIZE // max(1, math.prod(values.shape[1:])))
    return (values[begin : begin + chunk_rows] for begin in range(0, len(values), chunk_rows))
