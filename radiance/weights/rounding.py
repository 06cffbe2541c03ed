"""In what type a tensor is written: copied where its file has it so already, rounded else, and how far off that is."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from radiance.model.stored import BLOCK, quantise
from radiance.weights.checkpoint import Checkpoint, FileTensors
from radiance.weights.detect import MARKERS
from radiance.weights.files import DTYPES, CheckpointError, cast, finite
from radiance.weights.gguf import QUANTISED, GgufTensors, decoded, encoded

# What may be stored coarsely. All else is a small share of the weights and a large one of the damage: norms, biases, input and
# text projections, the approximator, everything NeRF.
BLOCK_MATRIX = re.compile(r"((text|double)_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])\.weight$")
PIECE = 1 << 22  # values that are rounded at a time: the largest matrix has 151 million


class Written(NamedTuple):
    """A tensor as it goes into a file."""

    values: np.ndarray
    scales: np.ndarray | None = None  # that its rows are multiplied by
    squares: float = 0.0  # the sum of the squares of what was rounded
    errors: float = 0.0  # and of what that changed


def type_of(name: str, shape: tuple[int, ...], stored: str, dtype: str | None, gguf: bool, small: str | None = None) -> str:
    """The type in which a tensor is written: `dtype`, or its own when None, but never one that is too coarse for it.

    small: its own type where that is `copyable`.
    """
    if name in MARKERS or name.startswith("nerf_image_embedder.") or (gguf and len(shape) == 1):
        return "float32"
    if dtype is None:
        return small or {"F32": "float32", "F64": "float32", "F16": "float16"}.get(stored, "bfloat16")
    if dtype in QUANTISED:
        return dtype if BLOCK_MATRIX.match(name) and shape[-1] % BLOCK == 0 else "bfloat16"
    if dtype == "int8" or DTYPES[dtype].itemsize == 1:
        return dtype if BLOCK_MATRIX.match(name) else "bfloat16"
    return dtype


def copyable(checkpoint: Checkpoint, name: str, to: str) -> str | None:
    """The small type that a tensor has in its file, if a file of the format `to` can have it bit for bit.

    Quantised tensors stay what they are from GGUF to GGUF. Among safetensors int8 and fp8 do, with scales in native files alone.
    """
    tensors = checkpoint.tensor
    if not isinstance(tensors, FileTensors) or name not in tensors.keys:
        return None
    if to == "gguf":
        key, *more = tensors.keys[name]
        rows = isinstance(tensors.file, GgufTensors) and not more and tensors.file.in_rows(key)
        return checkpoint.dtypes[name].lower() if rows else None
    small = checkpoint.store(name)
    scaled = any(tensors.file.scale_shape(key) is not None for key in tensors.keys[name])
    return None if small == "q8_0" or (scaled and to != "native") else small


def scale_shape(checkpoint: Checkpoint, name: str, copy: bool) -> tuple[int, ...] | None:
    """Of the scales beside a matrix of int8 or fp8 in a native file: one of each row, unless a copied one has but one in all."""
    rows = (checkpoint.shapes[name][0], 1)
    if not copy:
        return rows
    shapes = [checkpoint.tensor.file.scale_shape(key) for key in checkpoint.tensor.keys[name]]
    return shapes[0] if len(shapes) == 1 or not any(shape is not None for shape in shapes) else rows


def copied(checkpoint: Checkpoint, name: str, to: str) -> Written:
    """A `copyable` tensor. Raises CheckpointError when values are not finite."""
    tensors = checkpoint.tensor
    if to == "gguf":
        written = Written(tensors.file.rows(tensors.keys[name][0]))
        good = all(finite(tensors.file.expanded(part, checkpoint.dtypes[name])) for part in _pieces(written.values))
    else:
        packed, shape = tensors.packed(name), scale_shape(checkpoint, name, copy=True)
        written = Written(packed.values, None if shape is None else packed.scales[: math.prod(shape)].reshape(shape))
        good = packed.finite()
    if not good:
        raise CheckpointError(f"{name} holds values that are not finite: the file it comes from is damaged.")
    return written


def rounded(values: np.ndarray, dtype: str, name: str, gguf: bool) -> Written:
    """Values in a type, a few rows at a time. Raises CheckpointError when they are not finite, or would not be."""
    if exact(values.dtype, dtype):
        return Written(encoded(values, dtype, name) if gguf else cast(values, DTYPES[dtype], name))
    parts = [_rounded(part, dtype, name, gguf) for part in _pieces(values)]
    scales = None if parts[0].scales is None else np.concatenate([part.scales for part in parts])
    squares, errors = sum(part.squares for part in parts), sum(part.errors for part in parts)
    return Written(np.concatenate([part.values for part in parts]), scales, squares, errors)


def _rounded(values: np.ndarray, dtype: str, name: str, gguf: bool) -> Written:
    scales = None
    if dtype == "int8":
        small, scales = (x.T for x in quantise(cast(values, DTYPES["float32"], name).T, "int8"))
        after = small * scales
    else:
        small = encoded(values, dtype, name) if gguf else cast(values, DTYPES[dtype], name)
        after = decoded(small, dtype) if dtype in QUANTISED else small.view(DTYPES[dtype]).astype(np.float32)
    before = values.astype(np.float32)
    return Written(small, scales, _squares(before), _squares(before - after))


def _squares(x: np.ndarray) -> float:
    return float(np.vdot(x, x))


def exact(given: np.dtype, written: str) -> bool:
    """Whether no value can be rounded on the way."""
    return written in DTYPES and (given == DTYPES[written] or (written == "float32" and np.can_cast(given, np.float32)))


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Few rows at a time, so that the largest matrices are never held in float32."""
    rows = max(1, PIECE // max(1, math.prod(values.shape[1:])))
    return (values[begin : begin + rows] for begin in range(0, len(values), rows))
