"""Describe a checkpoint or a model without reading values."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.tables import format_table
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.conversion_report import find_network_part
from radiance.weights.detect import (
    LORA_DESCRIPTION,
    MODEL_KEY,
    OTHER_FILE_KINDS,
    SIGNATURE_TENSOR,
)
from radiance.weights.lora_description import describe_lora
from radiance.weights.opening import open_any_tensors
from radiance.weights.tensors import Tensors, TensorShapes

MAX_METADATA_LENGTH = 200  # characters of a value that are shown


def inspect_file(path: str | Path) -> str:
    """Return a description of a file: its model, its parameters by part and type, its metadata.

    Args:
        path: A weights file or folder of any format.

    Raises:
        CheckpointError: If the file is damaged.
    """
    file = open_any_tensors(path)
    if file.problem is not None:
        return _describe_tensors(file, f"{file.path} {file.problem}, which is not supported.")
    has_native_names = any(name.endswith(SIGNATURE_TENSOR) for name in file.shapes)
    if not has_native_names and not diffusers.has_diffusers_names(file.shapes):
        return _describe_tensors(file, _describe_other_file(file))
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:  # the file is intact, but not a model that can be converted
        return _describe_tensors(file, str(error))
    return "\n".join(
        [
            f"{file.path}: {checkpoint.format}, {len(file.shapes)} tensors.",
            _describe_model(checkpoint.model),
            _format_parts(checkpoint.shapes, checkpoint.dtypes),
            *_format_metadata(file),
        ]
    )


def _describe_tensors(file: Tensors, first_line: str) -> str:
    """Return a line, the number of tensors by type, and the metadata."""
    counts = _format_counts(dict.fromkeys(file.shapes, "tensors"), file.shapes, file.dtypes)
    return "\n".join([first_line, counts, *_format_metadata(file)])


def inspect_model(model: config.Model) -> str:
    """Return the description of a model without weights."""
    shapes = native.native_layout(model)[0]
    return "\n".join([_describe_model(model), _format_parts(shapes, dict.fromkeys(shapes, "F32"))])


def _describe_other_file(file: Tensors) -> str:
    """Return the kind of a file that cannot be opened as a model, and what a LoRA holds."""
    for pattern, description in OTHER_FILE_KINDS:
        if any(pattern in name for name in file.shapes):
            lines = [f"{file.path} is {description.partition(':')[0]}."]
            return "\n".join(
                lines + (describe_lora(file) if description == LORA_DESCRIPTION else [])
            )
    return f"{file.path} is not a known model."


def _describe_model(model: config.Model) -> str:
    """Return the most similar named model and every setting that differs from it."""
    name = min(config.MODELS, key=lambda name: len(config.differences(config.MODELS[name], model)))
    changes = config.differences(config.MODELS[name], model)
    if not changes:
        return f"The model is {name}."
    settings = ", ".join(
        f"{field.name}={getattr(model, field.name)}"
        for field in fields(model)
        if field.name in changes
    )
    return f"The model is {name} with {settings}."


def _format_parts(shapes: TensorShapes, dtypes: Mapping[str, str]) -> str:
    """Return the table of the network's parts."""
    return _format_counts({name: find_network_part(name) for name in shapes}, shapes, dtypes)


def _format_counts(
    parts: Mapping[str, str], shapes: TensorShapes, dtypes: Mapping[str, str]
) -> str:
    """Return the table of tensors and parameters by part and type."""
    shapes_by_row: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for name, shape in shapes.items():
        shapes_by_row[parts[name], dtypes[name]].append(shape)
    num_params = {row: sum(map(math.prod, row_shapes)) for row, row_shapes in shapes_by_row.items()}
    cells = [("part", "type", "tensors", "parameters")]
    for (part, dtype), row_shapes in shapes_by_row.items():
        cells.append((part, dtype, f"{len(row_shapes)}", f"{num_params[part, dtype]:,}"))
    cells.append(("total", "", f"{len(shapes)}", f"{sum(num_params.values()):,}"))
    return format_table(cells, num_text_columns=2)


def _format_metadata(file: Tensors) -> list[str]:
    """Return one line for each metadata value; long values are cut."""
    lines = []
    for key, value in file.metadata.items():
        text = str(value)
        if len(text) > MAX_METADATA_LENGTH:
            text = text[:MAX_METADATA_LENGTH] + "…"
        if key != MODEL_KEY:
            lines.append(f"{key}: {text}")
    return lines
