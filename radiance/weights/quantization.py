"""Read how other tools describe quantized weights, and name the formats that are not supported.

ComfyUI describes a layer in a tensor `LAYER.comfy_quant` or in the header, both in JSON. Every
description is followed, or the file is rejected: weights that are decoded in the wrong way look
like weights but are noise.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

HEADER_KEY = "_quantization_metadata"  # of the metadata: {"layers": {LAYER: description}}
# The formats that are supported, and the type in which each stores values.
DTYPES_BY_FORMAT = {
    "int8_tensorwise": "I8",
    "int8_rowwise": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fn_rowwise": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
# Settings of a description that do not change values.
NEUTRAL_SETTINGS = ("full_precision_matrix_mult", "orig_dtype", "per_row", "quantize_input")
DEFAULT_ROTATION_SIZE = 256
MAX_ROTATION_SIZE = 1 << 16
HADAMARD = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32) / 2
# Formats that are not supported, by patterns of the names of tensors. The first match counts.
UNSUPPORTED_FORMATS = (
    (r"\.(absmax|quant_map|SCB|quant_state\.bitsandbytes__\w+)", "bitsandbytes"),
    (r"\._(data|scale|shift)", "quanto"),
    (r"\.(wscales|wcscales|wtscale|smooth|smooth_factor)(_orig)?", "SVDQuant of Nunchaku"),
    (r"\.g_idx", "GPTQ"),
    (r"\.qzeros", "AWQ or GPTQ"),
    (r"\.(W_q|W_q_data)", "HQQ"),
    (r"\.(weight_packed|weight_zero_point)", "compressed-tensors"),
    (r"\.(svd_up|svd_down|zero_point)", "SDNQ"),
    (r"\.weight_scale_2", "NVFP4"),
    (r"\.weight_scale_inv", "fp8 with scales of blocks"),
    (r"\.(weight_codebook|weight_s_rel|weight_s_channel)", "W4A8"),
    (r"\.\w+_quantizer\._\w+", "ModelOpt"),
    (r"[._:](qdata|tensor_impl)", "torchao"),
    (r"\.biases", "MLX"),
    (r"\.(qweight|scales|weight_scales|weight_blocks)", "a format that is not known"),
)
# Metadata of which every value must be neutral, except for the values in GGUF files.
METADATA_PATTERN = re.compile(r"(?!general\.|quantize\.imatrix)(.*\.)?_?(quant|hadamard|convrot)")
NEUTRAL_VALUES = (
    *("", "none", "null", "false", "0", "{}", "[]"),
    *("fp32", "float32", "bf16", "bfloat16", "fp16", "float16", "fp8", "int8"),
    *DTYPES_BY_FORMAT,
)


class UnsupportedQuantizationError(ValueError):
    """Weights whose values are not known; the message is a clause without the file's name."""


class LayerNote(NamedTuple):
    """How the weight of a layer is quantized."""

    dtype: str  # of the values: I8, F8_E4M3, …
    rotation_size: int  # number of inputs that are rotated together (ConvRot); 0 for none
    shape: list[int] | None  # of the weight, if it is given


def find_unsupported_format(names: Iterable[str]) -> str | None:
    """Return the quantization of a file by the names of its tensors, if it is not supported."""
    text = "\n".join(names)
    for pattern, name in UNSUPPORTED_FORMATS:
        if re.search(f"{pattern}$", text, re.MULTILINE):
            return name
    return None


def read_notes(
    tensor_notes: Mapping[str, bytes], metadata: Mapping[str, str]
) -> dict[str, LayerNote]:
    """Return the notes of a file by layer.

    Args:
        tensor_notes: Content of the tensors `LAYER.comfy_quant`, by layer.
        metadata: Metadata of the file.

    Raises:
        UnsupportedQuantizationError: If a description is not understood completely, or two
            descriptions of a layer differ.
    """
    for key, value in metadata.items():
        is_note = key != HEADER_KEY and METADATA_PATTERN.match(key.lower())
        if is_note and value.strip().lower() not in NEUTRAL_VALUES:
            raise UnsupportedQuantizationError(f"has {key}={value[:80]!r} in its header")
    descriptions = [(layer, _parse_json(layer, text)) for layer, text in tensor_notes.items()]
    if HEADER_KEY in metadata:
        layers = _parse_json("its layers", metadata[HEADER_KEY]).get("layers")
        if not isinstance(layers, dict):
            raise UnsupportedQuantizationError(f"has {HEADER_KEY} without layers in its header")
        descriptions += layers.items()
    notes: dict[str, LayerNote] = {}
    for layer, description in descriptions:
        note = _parse_description(layer, description)
        if notes.setdefault(layer, note) != note:
            raise UnsupportedQuantizationError(f"describes {layer} twice, and differently")
    return notes


def merge_metadata(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of two files of a model; each describes its own layers."""
    merged = {**first, **second}
    if HEADER_KEY in first and HEADER_KEY in second:
        try:
            layers = [json.loads(metadata[HEADER_KEY])["layers"] for metadata in (first, second)]
            merged[HEADER_KEY] = json.dumps({"layers": {**layers[0], **layers[1]}})
        except (ValueError, KeyError, TypeError, RecursionError):
            merged[HEADER_KEY] = ""  # which is rejected as a description
    return merged


def _parse_json(subject: str, text: str | bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UnsupportedQuantizationError(f"describes {subject} in a way that is not JSON")
    return content


def _parse_description(layer: str, description: Any) -> LayerNote:
    """Return the note of a layer; settings may be in the description or in its `params`."""
    settings = dict(description) if isinstance(description, dict) else {}
    params = settings.pop("params", None)
    settings = {**(params if isinstance(params, dict) else {}), **settings}
    layer_format = settings.pop("format", None)
    if not isinstance(layer_format, str) or layer_format not in DTYPES_BY_FORMAT:
        raise UnsupportedQuantizationError(f"stores {layer} in the format {layer_format!r}")
    shape = settings.pop("orig_shape", None)
    is_rotated = settings.pop("convrot", False)
    rotation_size = settings.pop("convrot_groupsize", DEFAULT_ROTATION_SIZE)
    for key, value in settings.items():
        if key not in NEUTRAL_SETTINGS and value:
            raise UnsupportedQuantizationError(f"describes {layer} with {key}={value!r}")
    if is_rotated and not _is_rotation_size(rotation_size):
        raise UnsupportedQuantizationError(f"rotates {rotation_size!r} inputs of {layer} together")
    return LayerNote(DTYPES_BY_FORMAT[layer_format], rotation_size if is_rotated else 0, shape)


def _is_rotation_size(size: Any) -> bool:
    """Return True for powers of 4."""
    is_in_range = type(size) is int and 4 <= size <= MAX_ROTATION_SIZE
    return is_in_range and size & (size - 1) == 0 and size.bit_length() % 2 == 1


def check_note(layer: str, note: LayerNote, shape: tuple[int, ...], dtype: str):
    """Check that a weight is as its note describes it.

    Args:
        layer: Name of the layer.
        note: Its note.
        shape: Shape of its weight.
        dtype: Type of its weight, as stored.

    Raises:
        UnsupportedQuantizationError: If it is not.
    """
    if dtype != note.dtype or note.shape not in (None, list(shape)):
        raise UnsupportedQuantizationError(
            f"describes {layer} as {note.dtype} of shape {note.shape or list(shape)}, and stores "
            f"{dtype} of shape {list(shape)}"
        )
    if note.rotation_size and (len(shape) != 2 or shape[1] % note.rotation_size):
        raise UnsupportedQuantizationError(
            f"rotates {note.rotation_size} inputs of {layer} together, which do not divide its "
            f"shape {list(shape)}"
        )


def rotate_inputs(
    weight: Float32[np.ndarray, "out inner"], rotation_size: int
) -> Float32[np.ndarray, "out inner"]:
    """Return a weight with every group of inputs rotated, as ConvRot does before it quantizes.

    The rotation is a Kronecker power of a symmetric orthogonal matrix of four rows, and so its own
    inverse.

    Args:
        weight: Weight of a linear layer.
        rotation_size: Inputs of a group: a power of 4, which divides the inputs.
    """
    num_axes = (rotation_size.bit_length() - 1) // 2
    result = weight.reshape(-1, *[4] * num_axes)
    for _ in range(num_axes):  # each product moves the first axis of a group behind the others
        result = np.tensordot(result, HADAMARD, (1, 0))
    return result.reshape(weight.shape)
