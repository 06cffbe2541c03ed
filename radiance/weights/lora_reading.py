"""Read LoRA files of all common trainers and kinds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.weights import native
from radiance.weights.lora import LoraWeights
from radiance.weights.lora_changes import LoraPair, StackedChange, WeightChange
from radiance.weights.lora_modules import MisfitError, ModuleReader
from radiance.weights.lora_names import (
    UNKNOWN_TENSORS,
    UNSUPPORTED_KINDS,
    Target,
    describe_foreign,
    is_complete_tensor,
    list_targets,
    parse_name,
)
from radiance.weights.lora_settings import LoraSettings, read_settings
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import Tensors, TensorShapes

# Names of LoRA files in folders that hold other files too.
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
MERGE_ADVICE = (
    "merge it with the tool that trained it, and extract the difference if you need a LoRA"
)


@dataclass
class _Module:
    """The tensors of a file that change one weight, or some of its rows, and its bias."""

    name: str  # in the file
    keys: dict[str, str] = field(default_factory=dict)  # by role


def read_lora(path: str | Path, model: config.Model) -> LoraWeights:
    """Read a LoRA file for `model`.

    The names may be those of PEFT, ai-toolkit, diffusion-pipe, kohya, OneTrainer, LyCORIS,
    lodestone, XLabs or diffusers. The scale is alpha / rank; alpha is a tensor, or a setting in the
    header or in PEFT's `adapter_config.json`; without alpha the scale is 1. diffusers trains
    queries, keys, values and MLP of one native matrix as separate parts; they become one pair with
    a block-diagonal `up`. Tensors for other models, such as text encoders, are skipped; the notes
    of the result count them.

    Args:
        path: A safetensors file, or the folder that holds it.
        model: The model that the LoRA must fit.

    Returns:
        The pairs in float32, by native module name, and all other changes by native tensor name.

    Raises:
        CheckpointError: The file cannot be read or is of an unsupported kind, nothing in it fits
            the model, or a tensor lacks another one or is not finite. The message names the tensor.
    """
    file = open_tensors(_find_file(Path(path).expanduser()))
    settings = read_settings(file)
    modules, skipped = _group_keys(file, list_targets(model))
    file.require_weights(
        key for x in modules.values() for role, key in x.keys.items() if role != "alpha"
    )
    shapes = native.native_layout(model)[0]
    changes: dict[str, list[tuple[Target, WeightChange]]] = {}
    misfits: list[str] = []
    for target, module in modules.items():
        try:
            for name, change in _read_module(file, module, target, shapes, settings).items():
                changes.setdefault(name, []).append((target, change))
        except MisfitError as error:
            misfits.append(str(error))
            skipped["weights of another size"] += len(module.keys)
    _check_content(file, bool(changes), misfits, skipped)
    pairs, other_changes = _combine(file, changes, shapes)
    notes = _describe_skipped(file, skipped)
    if settings.alpha is not None and not any("alpha" in x.keys for x in modules.values()):
        notes.append(f"{file.path}: alpha is {settings.alpha:g} by the settings of the LoRA.")
    if all(change.is_zero for parts in changes.values() for _, change in parts):
        notes.append(
            f"{file.path} changes nothing, because all of its products are zero: use a LoRA that "
            "was saved after its training."
        )
    return LoraWeights(model, pairs, str(file.path), other_changes, tuple(notes))


def _find_file(path: Path) -> Path:
    """Return the LoRA file of a folder with PEFT's or diffusers' names, or the path itself."""
    if path.is_dir():
        return next((path / x for x in FOLDER_FILES if (path / x).is_file()), path)
    return path


def _read_module(
    file: Tensors,
    module: _Module,
    target: Target,
    shapes: TensorShapes,
    settings: LoraSettings,
) -> dict[str, WeightChange]:
    """Return the changes of a weight (or of some of its rows) and of its bias, by tensor name."""
    reader = ModuleReader(file, module.name, module.keys, settings)
    result: dict[str, WeightChange] = {}
    shape = (target.stop - target.start, *shapes[target.name][1:])
    if change := reader.make_weight_change(shape):
        result[target.name] = change
    bias_name = f"{target.name.removesuffix('.weight')}.bias"
    has_bias = bias_name in shapes
    if change := reader.make_bias_change((shape[0],) if has_bias else ()):
        result[bias_name] = change
    return result


# --- names ----------------------------------------------------------------------------------------


def _group_keys(
    file: Tensors, targets: Mapping[str, Target]
) -> tuple[dict[Target, _Module], Counter[str]]:
    """Return the keys of a file by the weight that they change, and count those of other models."""
    modules: dict[Target, _Module] = {}
    skipped: Counter[str] = Counter()
    for key in file.shapes:
        name = parse_name(key)
        target = targets.get(name.module.replace(".", "_")) if name else None
        if name is None or target is None:
            skipped[describe_foreign(key)] += 1
            continue
        if name.role in UNSUPPORTED_KINDS:
            raise CheckpointError(
                f"{file.path}: {key} belongs to another kind of adapter "
                f"({UNSUPPORTED_KINDS[name.role]}): {MERGE_ADVICE}."
            )
        module = modules.setdefault(target, _Module(name.module))
        first_key = module.keys.setdefault(name.role, key)
        if first_key != key:
            raise CheckpointError(
                f"{file.path}: {first_key} and {key} are the same part of one change, so the file "
                "holds more than one LoRA: use a file with one LoRA."
            )
    used_keys = [key for module in modules.values() for key in module.keys.values()]
    if used_keys and all(map(is_complete_tensor, used_keys)):  # as in a checkpoint
        skipped[UNKNOWN_TENSORS] += len(used_keys)
        modules = {}
    return modules, skipped


def _check_content(
    file: Tensors, has_changes: bool, misfits: list[str], skipped: Mapping[str, int]
) -> None:
    """Raise CheckpointError if nothing in a file fits the model."""
    if has_changes:
        return
    if misfits:
        raise CheckpointError(misfits[0])
    if not skipped:
        raise CheckpointError(f"{file.path} holds no tensors: copy or download it again.")
    if skipped.keys() == {UNKNOWN_TENSORS}:
        raise CheckpointError(
            f"{file.path} is no LoRA: {next(iter(file.shapes))} is not part of one, which holds "
            "matrices for modules of a model."
        )
    raise CheckpointError(
        f"{file.path} holds nothing for this model ({_format_counts(skipped)}): choose the model "
        "that the LoRA was trained for."
    )


def _describe_skipped(file: Tensors, skipped: Mapping[str, int]) -> list[str]:
    """Return a sentence that counts the tensors that are not used, if any."""
    if not skipped:
        return []
    num_used = len(file.shapes) - sum(skipped.values())
    return [
        f"{file.path}: {num_used} of {len(file.shapes)} tensors are used, the others are skipped "
        f"({_format_counts(skipped)})."
    ]


def _format_counts(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} for {part}" for part, count in skipped.items())


# --- parts of one weight --------------------------------------------------------------------------


def _combine(
    file: Tensors,
    changes: Mapping[str, list[tuple[Target, WeightChange]]],
    shapes: TensorShapes,
) -> tuple[dict[str, LoraPair], dict[str, WeightChange]]:
    """Return the pairs by module and all other changes by tensor, one for each."""
    pairs: dict[str, LoraPair] = {}
    other_changes: dict[str, WeightChange] = {}
    for name, parts in changes.items():
        parts.sort(key=lambda part: part[0].start)
        if any(second.start < first.stop for (first, _), (second, _) in pairwise(parts)):
            module = name.removesuffix(".weight")
            raise CheckpointError(
                f"{file.path} changes {module} both as a whole and in parts, so it holds more than "
                "one LoRA: use a file with one LoRA."
            )
        num_rows = shapes[name][0]
        part_pairs = [(t.rows, change) for t, change in parts if isinstance(change, LoraPair)]
        is_whole = parts[0][0].stop - parts[0][0].start == num_rows
        if len(part_pairs) == len(parts):
            pair = part_pairs[0][1] if is_whole else _combine_pairs(part_pairs, num_rows)
            pairs[name.removesuffix(".weight")] = pair
        else:
            other_changes[name] = (
                parts[0][1] if is_whole else StackedChange([(t.rows, c) for t, c in parts])
            )
    return pairs, other_changes


def _combine_pairs(parts: Sequence[tuple[slice, LoraPair]], num_rows: int) -> LoraPair:
    """Return one pair for parts stacked along the outputs; missing parts change nothing."""
    ups = []
    for rows, pair in parts:
        up = np.zeros((num_rows, len(pair.down)), np.float32)
        up[rows] = np.float32(pair.scale) * pair.up
        ups.append(up)
    return LoraPair(np.concatenate([pair.down for _, pair in parts]), np.concatenate(ups, axis=1))
