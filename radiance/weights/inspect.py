"""What a file holds, told without reading its values."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from radiance import config
from radiance.weights import diffusers, native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import part_of, table
from radiance.weights.detect import METADATA_KEY, OTHERS, canonical_names
from radiance.weights.files import Shapes, Tensors, open_tensors

SHOWN = 200  # characters of a metadata value


def inspect_file(path: str | Path) -> str:
    """Variant, sizes, parameters by part and type, metadata. Raises CheckpointError when the file is damaged."""
    file = open_tensors(path)
    is_model = any(name.endswith(diffusers.SIGN) for name in file.shapes) or "txt_in.weight" in canonical_names(file.shapes)
    if not is_model:
        known = next(
            (told.partition(":")[0] for sign, told in OTHERS if any(sign in name for name in file.shapes)), "not a model known here"
        )
        return "\n".join(
            [f"{file.path} is {known}.", _counts(dict.fromkeys(file.shapes, "tensors"), file.shapes, file.dtypes), *_notes(file)]
        )
    checkpoint = open_checkpoint(path)
    head = f"{file.path}: {checkpoint.format}, {len(file.shapes)} tensors."
    return "\n".join([head, _told(checkpoint.model), _parts(checkpoint.shapes, checkpoint.dtypes), *_notes(file)])


def inspect_model(model: config.Model) -> str:
    """The same of a model that is known by its settings."""
    shapes = native.layout(model)[0]
    return "\n".join([_told(model), _parts(shapes, dict.fromkeys(shapes, "F32"))])


def _told(model: config.Model) -> str:
    """The nearest named model, and every setting in which this one differs from it."""
    name = min(config.MODELS, key=lambda name: len(config.differences(config.MODELS[name], model)))
    changed = config.differences(config.MODELS[name], model)
    if not changed:
        return f"The model is {name}."
    told = ", ".join(f"{field.name}={getattr(model, field.name)}" for field in fields(model) if field.name in changed)
    return f"The model is {name} with {told}."


def _parts(shapes: Shapes, dtypes: Mapping[str, str]) -> str:
    return _counts({name: part_of(name) for name in shapes}, shapes, dtypes)


def _counts(parts: Mapping[str, str], shapes: Shapes, dtypes: Mapping[str, str]) -> str:
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for name, shape in shapes.items():
        line = found[parts[name], dtypes[name]]
        line[0], line[1] = line[0] + 1, line[1] + math.prod(shape)
    rows = [(part, dtype, f"{tensors}", f"{parameters:,}") for (part, dtype), (tensors, parameters) in found.items()]
    total = ("together", "", f"{sum(x for x, _ in found.values())}", f"{sum(x for _, x in found.values()):,}")
    return table([("part", "type", "tensors", "parameters"), *rows, total], left=2)


def _notes(file: Tensors) -> list[str]:
    notes = {key: str(value) for key, value in file.metadata.items() if key != METADATA_KEY}
    return [f"{key}: {value if len(value) <= SHOWN else value[:SHOWN] + '…'}" for key, value in notes.items()]
