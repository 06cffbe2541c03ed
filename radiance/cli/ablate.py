"""`radiance ablate`: runs what a suite has not run yet, and puts its results into a table."""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from radiance import config
from radiance.config.experiments import load_module


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "ablate", help="run a suite of ablations, or go on with it", description=main.__doc__
    )
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help="a name such as masking (experiments/ablations/masking.py), or a file; :NAME for one of several",
    )
    parser.add_argument("--scale", choices=("cpu", "gpu", "pod"), default="cpu")
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="0 to N - 1, at least 2; by default as the suite says",
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="by default all of the suite")
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="after which this piece saves and stops, 10 by default",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="by default results/SUITE/SCALE beside the suite's file",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/ablations"),
        metavar="FOLDER",
        help="for checkpoints; runs/ablations by default",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="run nothing: only make the table and the figure of what is there",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Trains the arms of a suite that have no result yet, all seeds of an arm at once, and writes the table and the figure. One call works for
    `--minutes`; the same command goes on, and exits with 143 until all is done.
    """
    from radiance.ablation.results import ResultFolder, get_code_version
    from radiance.ablation.trial import Trial, run_arm

    address, suite = _load_suite(options.suite)
    arms, scale = _select_arms(options, suite), suite.scales[options.scale]
    if not scale.num_images:
        _print_pod_commands(address, suite, arms)
        return 0
    seeds = tuple(range(scale.num_seeds if options.seeds is None else options.seeds))
    if len(seeds) < 2:
        raise config.ConfigError(f"--seeds {len(seeds)}: intervals need at least two seeds.")
    results = ResultFolder(
        options.results or Path(address).parent / "results" / suite.name / options.scale
    )
    if not options.table:
        commit, deadline = get_code_version(), time.monotonic() + 60 * options.minutes
        for arm in arms:
            print(
                f"{suite.name} {options.scale} {arm}: {len(seeds)} seeds of {scale.run.train.steps} steps.",
                flush=True,
            )
            trial = Trial(suite, options.scale, arm, seeds, commit)
            if run_arm(trial, results, options.work, lambda: time.monotonic() > deadline) is None:
                print(f"Stopped in arm {arm}: the same command goes on.", file=sys.stderr)
                return 143
    return _write_table(suite, options.scale, results)


def _load_suite(suite_address: str) -> tuple[str, Any]:
    """A suite and its address, as `radiance train` takes it with an arm behind it."""
    path, _, suite_name = suite_address.partition(":")
    path = path if path.endswith(".py") else f"experiments/ablations/{path}.py"
    module = load_module(path)
    module_suites = (
        {"": module.SUITE} if hasattr(module, "SUITE") else getattr(module, "SUITES", {})
    )
    suites = {
        f"{path}:{suite_name}" if suite_name else path: suite
        for suite_name, suite in module_suites.items()
    }
    if not suites:
        raise config.ConfigError(f"{path} is no suite: it has no SUITE.")
    address = f"{path}:{suite_name}" if suite_name else path
    if address not in suites:
        raise config.ConfigError(f"There is no suite {address}: there is {', '.join(suites)}.")
    return address, suites[address]


def _select_arms(options: argparse.Namespace, suite) -> list[str]:
    suite_arms = suite.arms_at(options.scale)
    if unknown_arms := [arm for arm in options.arms or () if arm not in suite_arms]:
        raise config.ConfigError(
            f"Suite {suite.name} has no arm {', '.join(unknown_arms)}: it has {', '.join(suite_arms)}."
        )
    return options.arms or list(suite_arms)


def _write_table(suite, scale: str, results) -> int:
    from radiance.ablation.report import draw_figure, format_suite_report
    from radiance.ablation.trial import hash_arm
    from radiance.base.files import replace_atomically

    arm_results = results.read_all({arm: hash_arm(suite, scale, arm) for arm in suite.arms_at(scale)})
    text = format_suite_report(suite, arm_results)
    for name, content in (("table.md", text), ("figure.svg", draw_figure(suite, arm_results))):
        with replace_atomically(results.folder / name) as temp_path:
            temp_path.write_text(content)
    print(text)
    return 0


def _print_pod_commands(address: str, suite, arms: list[str]):
    """A pod's arms are runs of their own, one for each seed."""
    print(
        "Arms of this scale are trained one by one, as any experiment is; `radiance plan` says what each costs:"
    )
    for arm in arms:
        changes = [f"name={suite.name}-{arm}-SEED", "train.seed=SEED", "data.path=FOLDER"]
        changes += ["text.file=T5"] if suite.arm_config("pod", arm).text.encoder == "t5" else []
        print("  " + shlex.join(["radiance", "train", f"{address}:{arm}", *changes]))
    print(f"SEED: 0 to {suite.scales['pod'].num_seeds - 1}.")
