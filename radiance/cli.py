"""`radiance train · sample · report · verify` (also `python -m radiance`)."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from radiance import config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. What the user can mend is told in one sentence, with exit code 2."""
    options = _parse(arguments)
    from radiance.data.datasets import DataError
    from radiance.text.encoders import TextError
    from radiance.training.loop import TrainingError
    from radiance.weights.files import CheckpointError

    try:
        return options.run(options)
    except (config.ConfigError, CheckpointError, DataError, TextError, TrainingError, ImportError, OSError) as error:
        print(f"radiance: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse, with key=value changes allowed among and behind the flags too."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "changes") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.changes += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="radiance", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train an experiment, or go on with it", description=_train.__doc__)
    train.add_argument("experiment", metavar="EXPERIMENT[:ARM]", help="a file of experiments/, or its dotted name")
    train.add_argument("changes", nargs="*", metavar="key=value", help="changes of its config, such as optimizer.learning_rate=2e-4")
    train.set_defaults(run=_train)

    sample = verbs.add_parser("sample", help="make pictures with a trained model", description=_sample.__doc__)
    sample.add_argument("model", metavar="RUN", help="a run directory")
    sample.add_argument("changes", nargs="*", metavar="key=value", help="changes of its sample settings, such as guidance=2")
    sample.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    sample.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    sample.add_argument("--seeds", type=_seeds, default=[0], help="such as 0, 0-3 or 1,5,9: every prompt is painted with each")
    sample.add_argument("--size", type=_size, help="WIDTHxHEIGHT; the training size by default")
    sample.add_argument("--out", type=Path, default=Path("pictures"), help="directory for the PNGs and sheet.png (default: pictures)")
    sample.set_defaults(run=_sample)

    report = verbs.add_parser("report", help="write a run's report.html", description=_report.__doc__)
    report.add_argument("run_directory", metavar="RUN", type=Path)
    report.set_defaults(run=_report)

    verify = verbs.add_parser("verify", help="compare with golden files", description=_verify.__doc__)
    verify.add_argument("files", nargs="+", metavar="FILE")
    verify.set_defaults(run=_verify)
    return parser


def _train(options: argparse.Namespace) -> int:
    """Trains an experiment in its run directory; the same command goes on where it stopped. Exit code 143 after SIGTERM."""
    from radiance.evaluation.report import write_report
    from radiance.training.loop import train

    run = config.override(experiment(options.experiment), options.changes)
    reached = train(run)
    if reached < run.train.steps:
        print(f"Stopped at step {reached}: the same command goes on.", file=sys.stderr)
        return 143
    print(f"{run.directory} is trained for {reached} steps; see {write_report(run.directory)}.")
    return 0


def _sample(options: argparse.Namespace) -> int:
    """Paints every prompt with every seed. The PNGs carry prompt, seed and settings."""
    from tqdm import tqdm

    from radiance.models import load
    from radiance.pictures import contact_sheet, save_png
    from radiance.training.directory import RunDirectory

    prompts = options.prompt + ([line for line in options.prompts.read_text().splitlines() if line.strip()] if options.prompts else [])
    if not prompts:
        raise config.ConfigError("There is nothing to paint: give --prompt TEXT or --prompts FILE.")
    settings = config.override(RunDirectory(Path(options.model)).read_config().sample, options.changes)
    pipeline = load(options.model, settings.weights)
    width, height = options.size or (None, None)
    jobs = [(prompt, seed) for prompt in prompts for seed in options.seeds]
    if any(options.out.glob("*.png")):
        raise config.ConfigError(f"{options.out} holds pictures already: give another --out.")
    painted = pipeline.paint([p for p, _ in jobs], [s for _, s in jobs], width, height, settings)
    pictures = []
    for picture in tqdm(painted, total=len(jobs), unit="picture", disable=None):  # disable=None: no bar in a log
        save_png(options.out / f"{len(pictures):05d}_seed{picture.facts['seed']}.png", picture.image, picture.facts)
        pictures.append(picture)
    columns = len(options.seeds) if len(options.seeds) > 1 else min(len(prompts), 10)
    sheet = contact_sheet([p.image for p in pictures], columns)
    save_png(options.out / "sheet.png", sheet, {"prompts": prompts, "seeds": options.seeds, "settings": config.to_dict(settings)})
    print(f"{len(pictures)} pictures and sheet.png are in {options.out}.")
    return 0


def _report(options: argparse.Namespace) -> int:
    """Writes report.html into the run directory: curves, pictures, config."""
    from radiance.evaluation.report import write_report

    print(write_report(options.run_directory))
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Compares this installation's outputs with the published implementation's. Exit code 1 when one is too far off."""
    from radiance.evaluation.verify import verify

    results = [result for file in options.files for result in verify(file)]
    for r in results:
        print(
            f"{r.file:40} {r.output:10} {r.error:.1e} of {r.tolerance:.1e} (rounding moves it by {r.rounding:.1e})  {'ok' if r.good else 'TOO FAR'}"
        )
    return 0 if all(r.good for r in results) else 1


def experiment(name: str) -> config.Config:
    """The config of EXPERIMENT[:ARM]: a file or dotted module with `config()`, and in `ARMS` the changes that each arm makes."""
    where, _, arm = name.rpartition(":") if ":" in name else (name, "", "")
    path = Path(where)
    if path.suffix == ".py":
        if not path.is_file():
            raise config.ConfigError(f"There is no experiment file {path}.")
        spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))  # an installed command does not look there
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not where.startswith(error.name):
                raise  # the experiment is there, and misses something itself
            raise config.ConfigError(f"There is no experiment {where}: give a file such as experiments/quickstart.py ({error}).") from None
    if not hasattr(module, "config"):
        raise config.ConfigError(f"{where} is no experiment: it has no config().")
    run = module.config()
    if not arm:
        return run
    arms = getattr(module, "ARMS", {})
    if arm not in arms:
        raise config.ConfigError(f"{where} has no arm {arm!r}: it has {', '.join(arms) or 'none'}.")
    return config.override(run, [f"name={run.name}-{arm}", *arms[arm]])


def _seeds(text: str) -> list[int]:
    seeds = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        seeds += range(int(low), int(high) + 1) if dash else [int(low)]
    if not seeds or max(seeds) >= 2**32:
        raise argparse.ArgumentTypeError("seeds are whole numbers below 2**32")
    return seeds


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    size = int(width), int(height or width)
    if min(size) < 1:
        raise argparse.ArgumentTypeError("a size is WIDTHxHEIGHT in pixels")
    return size
