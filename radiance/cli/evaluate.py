"""`radiance evaluate`: measure the loss and the samples of a model."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radiance import config
from radiance.cli.arguments import (
    EXPERIMENT_METAVAR,
    add_changes_argument,
    add_model_arguments,
    add_verb,
    get_model_overrides,
    parse_mesh,
)
from radiance.config.experiments import load_experiment

if TYPE_CHECKING:
    from radiance.data.source import Source
    from radiance.evaluation.features import Extractor
    from radiance.pipeline import Pipeline

FEATURE_NAMES = ("pixels16", "random", "inception:FILE")


def add_parser(subparsers):
    """Add the arguments of `radiance evaluate`."""
    parser = add_verb(
        subparsers,
        "evaluate",
        "measure a model on the validation split",
        main.__doc__,
        "radiance evaluate runs/quickstart",
        "radiance evaluate runs/mine sample.guidance_scale=2 --images 2000 --features pixels16",
        "radiance evaluate model.safetensors --experiment experiments/quickstart.py --out e.json",
    )
    add_model_arguments(parser)
    add_changes_argument(parser, "sample.guidance_scale=2 or model.masking=off")
    parser.add_argument(
        "--experiment",
        metavar=EXPERIMENT_METAVAR,
        help="data and settings for a checkpoint file",
    )
    parser.add_argument(
        "--weights",
        help="weights of a run: params, ema, ema=DECAY or width=WIDTH; by default sample.weights",
    )
    parser.add_argument(
        "--validate",
        type=int,
        metavar="N",
        help="images of the validation loss; by default train.validation_images",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        metavar="N",
        help="captions of the validation split to sample and compare with their images; 0: none",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        type=_parse_feature_name,
        default=["pixels16", "random"],
        metavar="NAME",
        help=f"features of the distances: {', '.join(FEATURE_NAMES)}",
    )
    parser.add_argument(
        "--clip",
        type=Path,
        metavar="FOLDER",
        help="a CLIP model of transformers, for the CLIP score",
    )
    parser.add_argument(
        "--mesh", type=parse_mesh, help="shard the model and the images, such as fsdp=8"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the result; by default evaluation.json in the run directory",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Measure the validation loss of a model in bins of time, and write evaluation.json.

    With --images, also compare samples with real images.
    """
    from radiance.base.files import replace_atomically, require_file
    from radiance.data.datasets import open_source
    from radiance.evaluation.clip import ClipScorer
    from radiance.evaluation.evaluate import check_images, select_images
    from radiance.loading import load
    from radiance.training.run_directory import is_run_directory

    run = _resolve_config(options)
    if options.out is None and not is_run_directory(options.model):
        raise config.ConfigError(
            f"{options.model} is a file, not a run that can hold the results: give --out FILE."
        )
    out = options.out or Path(options.model) / "evaluation.json"
    require_file(out)
    extractors = [_make_extractor(name) for name in options.features] if options.images else []
    clip = ClipScorer(options.clip) if options.clip else None
    source = open_source(run.data, "validation")
    pipeline = load(
        options.model,
        run=run,
        dtype=run.compute.dtype,
        mesh=options.mesh,
        **get_model_overrides(options),
    )
    indices = []
    if options.images:
        indices = select_images(source, run.data, pipeline.encoder, options.images)
        check_images(source, indices, run.data.resolution)

    result = _describe_evaluation(pipeline, source)
    num_images = min(options.validate or run.train.validation_images, len(source))
    result["validation"] = _evaluate_loss(pipeline, source, num_images)
    if options.images:
        result["sampling"] = _evaluate_samples(pipeline, source, indices, extractors, clip) | {
            "captions_too_long": min(options.images, len(source)) - len(indices)
        }
    result = _replace_nonfinite(result)
    try:
        with replace_atomically(out) as temp_path:
            temp_path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", "utf-8")
    finally:  # even if writing the file fails
        print(_format_result(result), flush=True)
    print(f"The complete result is in {out}.")
    return 0


def _describe_evaluation(pipeline: Pipeline, source: Source) -> dict[str, Any]:
    """Return what the numbers depend on: model, settings, data and environment."""
    from radiance.data.datasets import describe_source
    from radiance.training.run_directory import describe_environment

    run = pipeline.run
    return {
        "model": pipeline.origin,
        "command": shlex.join(sys.argv),
        "environment": describe_environment(),
        "config": config.to_dict(run),
        "config_hash": hashlib.sha256(config.to_json(run).encode()).hexdigest(),
        "data": describe_source(source, run.data, "validation"),
        "text": {"encoder": run.text.encoder, "identity": pipeline.encoder.identity},
    }


def _evaluate_loss(pipeline: Pipeline, source: Source, num_images: int) -> dict[str, Any]:
    import jax
    from tqdm import tqdm

    from radiance.distributed.sharding import make_mesh
    from radiance.evaluation.evaluate import evaluate_loss

    run = pipeline.run
    mesh = pipeline.mesh or make_mesh(config.Mesh(1, 1, 1), jax.local_devices()[:1])
    num_batches = -(-num_images // run.data.batch_size)
    with tqdm(total=num_batches, unit="batch", disable=None) as bar:
        losses = evaluate_loss(pipeline, source, num_images, mesh, bar.update)
    return losses | {"seed": run.train.seed}


def _evaluate_samples(
    pipeline: Pipeline, source: Source, indices: list[int], extractors: list[Extractor], clip: Any
) -> dict[str, Any]:
    from tqdm import tqdm

    from radiance.evaluation.evaluate import evaluate_samples

    with tqdm(total=len(indices), unit="image", disable=None) as bar:
        metrics = evaluate_samples(pipeline, source, indices, extractors, clip, bar.update)
    return metrics | {
        "images": len(indices),
        "seeds": [0, len(indices) - 1],
        "extractors": {extractor.name: extractor.identity for extractor in extractors},
        "clip": clip and clip.identity,
    }


# --- options --------------------------------------------------------------------------------------


def _resolve_config(options: argparse.Namespace) -> config.Config:
    """Return the settings of the evaluation, or raise ConfigError if options contradict."""
    from radiance.model.transformer import make_abstract_params
    from radiance.training.run_directory import RunDirectory, is_run_directory

    _check_options(options, is_run_directory(options.model))
    if options.experiment:
        trained_run = load_experiment(options.experiment)
    else:
        trained_run = RunDirectory(Path(options.model)).read_config()
    run = config.override(trained_run, options.changes)
    if make_abstract_params(run.model) != make_abstract_params(trained_run.model):
        changed_fields = ", ".join(config.differences(trained_run.model, run.model, "model."))
        raise config.ConfigError(
            f"{options.model} was trained with other parameters than {changed_fields} would need: "
            "change only settings that leave the parameters as they are."
        )
    if options.weights:
        run = replace(run, sample=replace(run.sample, weights=options.weights))
    if run.model.channels != 3:
        raise config.ConfigError(
            f"{options.model} has model.channels={run.model.channels}, and images have 3: evaluate "
            "a pixel model."
        )
    return run


def _check_options(options: argparse.Namespace, is_run: bool):
    """Raise ConfigError if options contradict each other or the kind of model."""
    if is_run and options.experiment:
        raise config.ConfigError(
            f"{options.model} is a run directory and has a config: do not give --experiment."
        )
    if not is_run and not options.experiment:
        raise config.ConfigError(
            f"{options.model} is a file, which does not name its data: give --experiment."
        )
    if options.weights and not is_run:
        raise config.ConfigError(
            f"{options.model} is a file and has one kind of weights: --weights is for run "
            "directories."
        )
    if options.images < 0 or (options.validate is not None and options.validate < 1):
        raise config.ConfigError(
            "--validate and --images are numbers of images: give at least 1, or do not give them."
        )
    if options.clip and not options.images:
        raise config.ConfigError("--clip measures samples: give --images too.")


def _parse_feature_name(name: str) -> str:
    """Return the name of a feature extractor, or raise an error of argparse."""
    if name not in FEATURE_NAMES[:2] and not name.startswith("inception:"):
        raise argparse.ArgumentTypeError(
            f"{name} is not one of {', '.join(FEATURE_NAMES)} (give changes of settings before "
            "--features)"
        )
    return name


def _make_extractor(name: str) -> Extractor:
    """Return the feature extractor of that name."""
    from radiance.evaluation.features import PixelExtractor, RandomNetworkExtractor
    from radiance.evaluation.inception import InceptionExtractor

    kind, _, file = name.partition(":")
    return (
        InceptionExtractor(file)
        if kind == "inception"
        else {"pixels16": PixelExtractor, "random": RandomNetworkExtractor}[kind]()
    )


def _replace_nonfinite(value: Any) -> Any:
    """Replace numbers that JSON does not support by None."""
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- report ---------------------------------------------------------------------------------------


def _format_result(result: Mapping[str, Any]) -> str:
    """Format the numbers of an evaluation as tables."""
    from radiance.base.tables import format_table

    validation, bins = result["validation"], result["validation"]["bins"]
    bin_labels = [f"{i / len(bins):.4g} – {(i + 1) / len(bins):.4g}" for i in range(len(bins))]
    sections = [
        f"{result['model']}: validation loss {validation['loss']:.5f} "
        f"({validation['images']} images)",
        format_table(
            [
                ("time", "loss"),
                *((label, _format_number(loss)) for label, loss in zip(bin_labels, bins)),
            ]
        ),
    ]
    if sampling := result.get("sampling"):
        sections.append(
            format_table(
                [
                    ("samples", _format_number(sampling["images"])),
                    *((name, _format_number(x)) for name, x in sampling["metrics"].items()),
                ]
            )
        )
        if scenes := sampling.get("scenes"):
            rows = [
                (name, _format_number(x), _format_number(sampling["scenes by chance"][name]))
                for name, x in scenes.items()
            ]
            sections.append(
                format_table([("agreement with captions", "fraction", "by chance"), *rows])
            )
    return "\n\n".join(sections)


def _format_number(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
