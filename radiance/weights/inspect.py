"""What a file holds, told without reading its values."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from radiance import config
from radiance.base.tables import format_table
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import find_network_part
from radiance.weights.detect import MODEL_KEY, OTHER_FILE_KINDS, canonical_names
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import Tensors, TensorShapes

MAX_METADATA_LENGTH = 200  # characters of a metadata value


def inspect_file(path: str | Path) -> str:
    """Variant, sizes, parameters by part and type, metadata. Raises CheckpointError when the file is damaged."""
    file = open_tensors(path)
    is_model = any(
        name.endswith(diffusers.SIGNATURE_TENSOR) for name in file.shapes
    ) or "txt_in.weight" in canonical_names(file.shapes)
    if not is_model:
        file_kind = next(
            (
                description.partition(":")[0]
                for pattern, description in OTHER_FILE_KINDS
                if any(pattern in name for name in file.shapes)
            ),
            "not a model known here",
        )
        return "\n".join(
            [
                f"{file.path} is {file_kind}.",
                _format_counts(dict.fromkeys(file.shapes, "tensors"), file.shapes, file.dtypes),
                *_format_metadata(file),
            ]
        )
    checkpoint = open_checkpoint(path)
    summary = f"{file.path}: {checkpoint.format}, {len(file.shapes)} tensors."
    return "\n".join(
        [
            summary,
            _describe_model(checkpoint.model),
            _format_parts(checkpoint.shapes, checkpoint.dtypes),
            *_format_metadata(file),
        ]
    )


def inspect_model(model: config.Model) -> str:
    """The same of a model that is known by its settings."""
    shapes = native.native_layout(model)[0]
    return "\n".join([_describe_model(model), _format_parts(shapes, dict.fromkeys(shapes, "F32"))])


def _describe_model(model: config.Model) -> str:
    """The nearest named model, and every setting in which this one differs from it."""
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
    return _format_counts({name: find_network_part(name) for name in shapes}, shapes, dtypes)


def _format_counts(
    parts: Mapping[str, str], shapes: TensorShapes, dtypes: Mapping[str, str]
) -> str:
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, shape in shapes.items():
        count = counts[parts[name], dtypes[name]]
        count[0], count[1] = count[0] + 1, count[1] + math.prod(shape)
    rows = [
        (part, dtype, f"{num_tensors}", f"{num_params:,}")
        for (part, dtype), (num_tensors, num_params) in counts.items()
    ]
    total = (
        "together",
        "",
        f"{sum(x for x, _ in counts.values())}",
        f"{sum(x for _, x in counts.values()):,}",
    )
    return format_table(
        [("part", "type", "tensors", "parameters"), *rows, total], num_text_columns=2
    )


def _format_metadata(file: Tensors) -> list[str]:
    metadata = {key: str(value) for key, value in file.metadata.items() if key != MODEL_KEY}
    return [
        f"{key}: {value if len(value) <= MAX_METADATA_LENGTH else value[:MAX_METADATA_LENGTH] + '…'}"
        for key, value in metadata.items()
    ]
