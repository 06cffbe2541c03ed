"""The LoRA files of `radiance convert`: a run's own, the difference of two models, and renaming."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from radiance import config
from radiance.cli.arguments import get_model_overrides, parse_whole_number
from radiance.weights.formats import EXPORT_FORMATS, FORMATS_BY_SUFFIX, LORA_NAMINGS

if TYPE_CHECKING:
    from radiance.weights.checkpoint import Checkpoint
    from radiance.weights.lora import LoraWeights

LORA_DTYPES = ("float32", "bfloat16", "float16")
MAX_RANK = 65_536


def add_lora_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of the extraction of a LoRA."""
    parser.add_argument(
        "--extract",
        metavar="BASE",
        help="write the difference of MODEL and BASE as a LoRA (--to peft, kohya or diffusers)",
    )
    parser.add_argument(
        "--rank",
        type=parse_whole_number(1, MAX_RANK),
        default=32,
        help="rank of the extracted LoRA",
    )


def is_lora_output(options: argparse.Namespace, target_format: str) -> bool:
    """Return whether OUT is a LoRA. In format diffusers, a model is a folder and a LoRA a file."""
    if target_format in LORA_NAMINGS and target_format in EXPORT_FORMATS:
        return bool(options.extract) or options.out.suffix in FORMATS_BY_SUFFIX
    return target_format in LORA_NAMINGS


def read_lora(path: str, model: config.Model) -> LoraWeights:
    """Read a LoRA file, and print the notes about it."""
    from radiance.weights import lora_reading

    result = lora_reading.read_lora(path, model)
    for note in result.notes:
        print(note)
    return result


def write_lora(options: argparse.Namespace, checkpoint: Checkpoint, naming: str, dtype: str) -> int:
    """Write the LoRA of a run, the difference of two models, or a LoRA file with other names."""
    from radiance.training.run_directory import RunDirectory, is_run_directory

    if is_run_directory(options.model) and not options.extract and not options.lora:
        run = RunDirectory(Path(options.model)).read_config()
        if run.lora.rank:
            return _write_trained_lora(options, run, naming, dtype)
    if options.extract:
        return _extract_lora(options, checkpoint, naming, dtype)
    if len(options.lora) == 1:
        return _rename_lora(options, checkpoint, naming, dtype)
    raise config.ConfigError(
        f"--to {naming} writes a LoRA: give a run that trained one, --extract BASE, the model that "
        "MODEL was trained from, or one --lora FILE to rename."
    )


def _write_trained_lora(
    options: argparse.Namespace, run: config.Config, naming: str, dtype: str
) -> int:
    from radiance.loading import load_trained_lora
    from radiance.weights import lora

    weights = options.weights or run.sample.weights
    run = replace(run, sample=replace(run.sample, weights=weights))
    result = load_trained_lora(options.model, run)
    lora.write_lora(options.out, result, naming, dtype)
    print(f"{result.origin} is written to {options.out}: {len(result.pairs)} matrices.")
    return 0


def _extract_lora(
    options: argparse.Namespace, checkpoint: Checkpoint, naming: str, dtype: str
) -> int:
    from tqdm import tqdm

    from radiance.weights import lora
    from radiance.weights.lora_extraction import extract_lora

    base = open_other_model(options.extract, options)
    with tqdm(
        total=count_params(checkpoint), unit="parameter", unit_scale=True, disable=None
    ) as bar:
        result = extract_lora(base, checkpoint, options.rank, on_progress=bar.update)
    lora.write_lora(options.out, result.lora, naming, dtype)
    print(
        f"{options.out} contains {result.total_explained_fraction:.1%} of the squared difference "
        f"of {len(result.lora.pairs)} matrices at rank {options.rank}."
    )
    if result.remaining_changes:
        largest_changes = sorted(result.remaining_changes.items(), key=lambda x: -x[1])[:3]
        names = ", ".join(f"{name} ({change:.1e})" for name, change in largest_changes)
        print(
            f"{len(result.remaining_changes)} other tensors changed too, which a LoRA of the "
            f"blocks' matrices cannot contain; most of all {names}."
        )
    return 0


def _rename_lora(
    options: argparse.Namespace, checkpoint: Checkpoint, naming: str, dtype: str
) -> int:
    from radiance.weights import lora

    (path, strength), *_ = options.lora
    if strength is not None:
        raise config.ConfigError(
            f"--lora {path}:{strength:g}: renaming does not change the strength of a LoRA; give "
            "it where the LoRA is used."
        )
    lora.write_lora(options.out, read_lora(path, checkpoint.model), naming, dtype)
    print(f"{path} is written to {options.out} with the names of {naming}.")
    return 0


def open_other_model(path: str, options: argparse.Namespace) -> Checkpoint:
    """Open a second model; the options that describe MODEL also apply to it if it is a file."""
    from radiance.loading import open_model
    from radiance.training.run_directory import is_run_directory

    if is_run_directory(path):
        return open_model(path)
    return open_model(path, **get_model_overrides(options))


def count_params(checkpoint: Checkpoint) -> int:
    """Count the parameters of a checkpoint."""
    return sum(math.prod(shape) for shape in checkpoint.shapes.values())
