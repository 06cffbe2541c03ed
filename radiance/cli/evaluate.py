"""`radiance evaluate`: a model in numbers."""

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
from radiance.cli.arguments import add_model_arguments, get_model_overrides, parse_mesh
from radiance.config.experiments import load_experiment

if TYPE_CHECKING:
    from radiance.evaluation.features import Extractor

FEATURE_NAMES = ("pixels16", "random", "inception:FILE")


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "evaluate", help="measure a model on the validation split", description=main.__doc__
    )
    add_model_arguments(parser)
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes of its config, such as sample.guidance_scale=2 or model.masking=off",
    )
    parser.add_argument(
        "--experiment",
        metavar="EXPERIMENT[:ARM…]",
        help="of a checkpoint file: whose data and settings it is measured with",
    )
    parser.add_argument(
        "--weights",
        help="of a run: params, ema, ema=DECAY or width=WIDTH; its own choice by default",
    )
    parser.add_argument(
        "--validate",
        type=int,
        metavar="N",
        help="images for the loss; by default train.validation_images",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        metavar="N",
        help="captions of the validation split to paint and compare; 0: none",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        type=_parse_feature_name,
        default=["pixels16", "random"],
        metavar="NAME",
        help=f"for the distances: {', '.join(FEATURE_NAMES)}",
    )
    parser.add_argument(
        "--clip", type=Path, metavar="FOLDER", help="a CLIP of transformers, for the CLIP score"
    )
    parser.add_argument(
        "--mesh",
        type=parse_mesh,
        help="over which the model and the images are spread, such as fsdp=8",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="by default evaluation.json in the run directory"
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Measures a model's loss in bins of time, and with --images what it paints beside real images; writes evaluation.json."""
    import jax
    from tqdm import tqdm

    from radiance.base.files import replace_atomically, require_file
    from radiance.data.datasets import describe_source, open_source
    from radiance.distributed.sharding import make_mesh
    from radiance.evaluation.clip import ClipScorer
    from radiance.evaluation.evaluate import (
        check_images,
        evaluate_loss,
        evaluate_samples,
        select_images,
    )
    from radiance.loading import load
    from radiance.training.run_directory import describe_environment, is_run_directory

    run = _resolve_config(options)
    if options.out is None and not is_run_directory(options.model):
        raise config.ConfigError(
            f"{options.model} is a file, beside which nothing is written: give --out FILE."
        )
    out = options.out or Path(options.model) / "evaluation.json"
    require_file(out)
    extractors = [_make_extractor(name) for name in options.features] if options.pictures else []
    clip = ClipScorer(options.clip) if options.clip else None
    source = open_source(run.data, "validation")
    pipeline = load(
        options.model,
        run=run,
        dtype=run.compute.dtype,
        mesh=options.mesh,
        **get_model_overrides(options),
    )
    if options.pictures:
        indices = select_images(source, run.data, pipeline.encoder, options.pictures)
        check_images(source, indices, run.data.resolution)

    result: dict[str, Any] = {
        "model": pipeline.origin,
        "command": shlex.join(sys.argv),
        "environment": describe_environment(),
        "config": config.to_dict(run),
        "config_hash": hashlib.sha256(config.to_json(run).encode()).hexdigest(),
        "data": describe_source(source, run.data, "validation"),
        "text": {"encoder": run.text.encoder, "identity": pipeline.encoder.identity},
    }
    num_images = min(options.validate or run.train.validation_images, len(source))
    device_mesh = pipeline.mesh or make_mesh(config.Mesh(1, 1, 1), jax.local_devices()[:1])
    with tqdm(total=-(-num_images // run.data.batch_size), unit="batch", disable=None) as bar:
        result["validation"] = evaluate_loss(
            pipeline, source, num_images, device_mesh, bar.update
        ) | {"seed": run.train.seed}
    if options.pictures:
        with tqdm(total=len(indices), unit="image", disable=None) as bar:
            result["sampling"] = evaluate_samples(
                pipeline, source, indices, extractors, clip, bar.update
            ) | {
                "images": len(indices),
                "seeds": [0, len(indices) - 1],
                "captions_too_long": min(options.pictures, len(source)) - len(indices),
                "extractors": {extractor.name: extractor.identity for extractor in extractors},
                "clip": clip and clip.identity,
            }
    result = _replace_nonfinite(result)
    print(_format_result(result), flush=True)  # whatever becomes of the file
    with replace_atomically(out) as temp_path:
        temp_path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(f"All of it is in {out}.")
    return 0


def _resolve_config(options: argparse.Namespace) -> config.Config:
    """The config that the model is measured with. Raises ConfigError when it cannot be."""
    from radiance.model.transformer import make_abstract_params
    from radiance.training.run_directory import RunDirectory, is_run_directory

    if is_run_directory(options.model) == bool(options.experiment):
        reason = (
            "is a run directory and has a config"
            if options.experiment
            else "is a file, and does not say what it is measured on"
        )
        raise config.ConfigError(
            f"{options.model} {reason}: {'leave --experiment out' if options.experiment else 'give --experiment'}."
        )
    if options.weights and options.experiment:
        raise config.ConfigError(
            f"{options.model} is a file and has one kind of weights: --weights is for run directories."
        )
    trained_run = (
        load_experiment(options.experiment)
        if options.experiment
        else RunDirectory(Path(options.model)).read_config()
    )
    run = config.override(trained_run, options.changes)
    if make_abstract_params(run.model) != make_abstract_params(trained_run.model):
        changed_fields = ", ".join(config.differences(trained_run.model, run.model, "model."))
        raise config.ConfigError(
            f"{options.model} was trained as another network than {changed_fields} would make: change what leaves its parameters as they are."
        )
    if options.weights:
        run = replace(run, sample=replace(run.sample, weights=options.weights))
    if run.model.channels != 3:
        raise config.ConfigError(
            f"{options.model} has model.channels={run.model.channels}, and images have 3: measure a pixel model."
        )
    if options.pictures < 0 or (options.validate is not None and options.validate < 1):
        raise config.ConfigError(
            "--validate and --images are numbers of images: give at least 1, or leave them out."
        )
    if options.clip and not options.pictures:
        raise config.ConfigError("--clip measures images that are painted: give --images too.")
    return run


def _parse_feature_name(name: str) -> str:
    if name not in FEATURE_NAMES[:2] and not name.startswith("inception:"):
        raise argparse.ArgumentTypeError(
            f"{name} is none of {', '.join(FEATURE_NAMES)} (changes of the config come before --features)"
        )
    return name


def _make_extractor(name: str) -> "Extractor":
    from radiance.evaluation.features import PixelExtractor, RandomNetworkExtractor
    from radiance.evaluation.inception import InceptionExtractor

    kind, _, file = name.partition(":")
    return (
        InceptionExtractor(file)
        if kind == "inception"
        else {"pixels16": PixelExtractor, "random": RandomNetworkExtractor}[kind]()
    )


def _replace_nonfinite(value: Any) -> Any:
    """JSON has no other numbers: null stands for them."""
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _format_result(result: Mapping[str, Any]) -> str:
    from radiance.base.tables import format_table

    validation, bins = result["validation"], result["validation"]["bins"]
    bin_labels = [f"{i / len(bins):.4g} – {(i + 1) / len(bins):.4g}" for i in range(len(bins))]
    sections = [
        f"{result['model']}: validation loss {validation['loss']:.5f} ({validation['images']} images)",
        format_table(
            [
                ("time", "loss"),
                *((label, _format_number(loss)) for label, loss in zip(bin_labels, bins)),
            ],
            num_text_columns=1,
        ),
    ]
    if sampling := result.get("sampling"):
        sections.append(
            format_table(
                [
                    ("painted", _format_number(sampling["images"])),
                    *((name, _format_number(x)) for name, x in sampling["metrics"].items()),
                ],
                num_text_columns=1,
            )
        )
        if scenes := sampling.get("scenes"):
            rows = [
                (name, _format_number(x), _format_number(sampling["scenes by chance"][name]))
                for name, x in scenes.items()
            ]
            sections.append(
                format_table([("read as told", "share", "by chance"), *rows], num_text_columns=1)
            )
    return "\n\n".join(sections)


def _format_number(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
