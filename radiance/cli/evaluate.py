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
from radiance.cli.arguments import add_model, known, mesh
from radiance.cli.experiments import experiment

if TYPE_CHECKING:
    from radiance.evaluation.features import Extractor

FEATURES = ("pixels16", "random", "inception:FILE")


def add(verbs):
    parser = verbs.add_parser("evaluate", help="measure a model on the validation split", description=main.__doc__)
    add_model(parser)
    parser.add_argument(
        "changes", nargs="*", metavar="key=value", help="changes of its config, such as sample.guidance=2 or model.masking=off"
    )
    parser.add_argument(
        "--experiment", metavar="EXPERIMENT[:ARM…]", help="of a checkpoint file: whose data and settings it is measured with"
    )
    parser.add_argument("--weights", help="of a run: params, ema, ema=DECAY or width=WIDTH; its own choice by default")
    parser.add_argument("--validate", type=int, metavar="N", help="pictures for the loss; by default train.validate_pictures")
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="N", help="captions of the validation split to paint and compare; 0: none"
    )
    parser.add_argument(
        "--features",
        nargs="+",
        type=_features,
        default=["pixels16", "random"],
        metavar="NAME",
        help=f"for the distances: {', '.join(FEATURES)}",
    )
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="a CLIP of transformers, for the CLIP score")
    parser.add_argument("--mesh", type=mesh, help="over which the model and the pictures are spread, such as fsdp=8")
    parser.add_argument("--out", type=Path, metavar="FILE", help="by default evaluation.json in the run directory")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Measures a model's loss in bins of time, and with --pictures what it paints beside real pictures; writes evaluation.json."""
    import jax
    from tqdm import tqdm

    from radiance.data.datasets import describe, open_source
    from radiance.evaluation.clip import Clip
    from radiance.evaluation.measure import captioned, check_pictures, sampling, validation
    from radiance.models import load
    from radiance.sharding import make_mesh
    from radiance.training.directory import environment, is_run
    from radiance.weights.files import replacing, require_file

    run = _run(options)
    if options.out is None and not is_run(options.model):
        raise config.ConfigError(f"{options.model} is a file, beside which nothing is written: give --out FILE.")
    out = options.out or Path(options.model) / "evaluation.json"
    require_file(out)
    extractors = [_extractor(name) for name in options.features] if options.pictures else []
    clip = Clip(options.clip) if options.clip else None
    source = open_source(run.data, "validation")
    pipeline = load(options.model, run=run, dtype=run.compute.dtype, mesh=options.mesh, **known(options))
    if options.pictures:
        chosen = captioned(source, run.data, pipeline.encoder, options.pictures)
        check_pictures(source, chosen, run.data.side)

    found: dict[str, Any] = {
        "model": pipeline.origin,
        "command": shlex.join(sys.argv),
        "environment": environment(),
        "config": config.to_dict(run),
        "config_hash": hashlib.sha256(config.to_json(run).encode()).hexdigest(),
        "data": describe(source, run.data, "validation"),
        "text": {"encoder": run.text.encoder, "identity": pipeline.encoder.identity},
    }
    count = min(options.validate or run.train.validate_pictures, len(source))
    devices = pipeline.mesh or make_mesh(config.Mesh(1, 1, 1), jax.local_devices()[:1])
    with tqdm(total=-(-count // run.data.batch), unit="batch", disable=None) as bar:
        found["validation"] = validation(pipeline, source, count, devices, bar.update) | {"seed": run.train.seed}
    if options.pictures:
        with tqdm(total=len(chosen), unit="picture", disable=None) as bar:
            found["sampling"] = sampling(pipeline, source, chosen, extractors, clip, bar.update) | {
                "pictures": len(chosen),
                "seeds": [0, len(chosen) - 1],
                "captions_too_long": min(options.pictures, len(source)) - len(chosen),
                "extractors": {extractor.name: extractor.identity for extractor in extractors},
                "clip": clip and clip.identity,
            }
    found = _finite(found)
    print(_told(found), flush=True)  # whatever becomes of the file
    with replacing(out) as part:
        part.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    print(f"All of it is in {out}.")
    return 0


def _run(options: argparse.Namespace) -> config.Config:
    """The config that the model is measured with. Raises ConfigError when it cannot be."""
    from radiance.model.transformer import abstract
    from radiance.training.directory import RunDirectory, is_run

    if is_run(options.model) == bool(options.experiment):
        why = "is a run directory and has a config" if options.experiment else "is a file, and does not say what it is measured on"
        raise config.ConfigError(f"{options.model} {why}: {'leave --experiment out' if options.experiment else 'give --experiment'}.")
    if options.weights and options.experiment:
        raise config.ConfigError(f"{options.model} is a file and has one kind of weights: --weights is for run directories.")
    trained = experiment(options.experiment) if options.experiment else RunDirectory(Path(options.model)).read_config()
    run = config.override(trained, options.changes)
    if abstract(run.model) != abstract(trained.model):
        told = ", ".join(config.differences(trained.model, run.model, "model."))
        raise config.ConfigError(
            f"{options.model} was trained as another network than {told} would make: change what leaves its parameters as they are."
        )
    if options.weights:
        run = replace(run, sample=replace(run.sample, weights=options.weights))
    if run.model.channels != 3:
        raise config.ConfigError(f"{options.model} has model.channels={run.model.channels}, and pictures have 3: measure a pixel model.")
    if options.pictures < 0 or (options.validate is not None and options.validate < 1):
        raise config.ConfigError("--validate and --pictures are numbers of pictures: give at least 1, or leave them out.")
    if options.clip and not options.pictures:
        raise config.ConfigError("--clip measures pictures that are painted: give --pictures too.")
    return run


def _features(name: str) -> str:
    if name not in FEATURES[:2] and not name.startswith("inception:"):
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(FEATURES)} (changes of the config come before --features)")
    return name


def _extractor(name: str) -> "Extractor":
    from radiance.evaluation.features import Pixels, RandomNetwork
    from radiance.evaluation.inception import Inception

    kind, _, file = name.partition(":")
    return Inception(file) if kind == "inception" else {"pixels16": Pixels, "random": RandomNetwork}[kind]()


def _finite(value: Any) -> Any:
    """JSON has no other numbers: null stands for them."""
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(found: Mapping[str, Any]) -> str:
    from radiance.weights.convert import table

    measured, bins = found["validation"], found["validation"]["bins"]
    times = [f"{i / len(bins):.4g} – {(i + 1) / len(bins):.4g}" for i in range(len(bins))]
    told = [
        f"{found['model']}: validation loss {measured['loss']:.5f} ({measured['pictures']} pictures)",
        table([("time", "loss"), *((time, _number(loss)) for time, loss in zip(times, bins))], left=1),
    ]
    if painted := found.get("sampling"):
        told.append(
            table([("painted", _number(painted["pictures"])), *((name, _number(x)) for name, x in painted["numbers"].items())], left=1)
        )
        if scenes := painted.get("scenes"):
            rows = [(name, _number(x), _number(painted["scenes by chance"][name])) for name, x in scenes.items()]
            told.append(table([("read as told", "share", "by chance"), *rows], left=1))
    return "\n\n".join(told)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
