"""`radiance ablate`: train the missing variants of a suite, and write a table of its results."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from radiance import config
from radiance.cli.arguments import add_verb, parse_duration, parse_whole_number
from radiance.config.experiments import load_module

if TYPE_CHECKING:
    from radiance.ablation.results import ResultFolder
    from radiance.ablation.suite import Suite

MAX_ABLATION_SEEDS = 1000  # which are trained at once


def add_parser(subparsers):
    """Add the arguments of `radiance ablate`."""
    parser = add_verb(
        subparsers,
        "ablate",
        "run an ablation suite, or continue it",
        main.__doc__,
        "radiance ablate masking",
        "radiance ablate experiments/ablations/masking.py --variants one_pad off --seeds 5",
        "radiance ablate masking --table",
    )
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help="a name such as masking (experiments/ablations/masking.py), or a file; :NAME selects "
        "one of several",
    )
    parser.add_argument(
        "--scale",
        choices=("cpu", "gpu", "pod"),
        default="cpu",
        help="size of the models and of the training (default: cpu)",
    )
    parser.add_argument(
        "--seeds",
        type=parse_whole_number(2, MAX_ABLATION_SEEDS),
        metavar="N",
        help="train seeds 0 to N - 1, at least 2; by default those of the suite",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="VARIANT",
        help="variants to train; by default all of the suite",
    )
    parser.add_argument(
        "--minutes",
        type=parse_duration,
        default=10.0,
        help="save and stop after this time; the same command continues (default: 10)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="folder of the results; by default results/SUITE/SCALE beside the suite's file",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/ablations"),
        metavar="FOLDER",
        help="folder of checkpoints (default: runs/ablations)",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="train nothing: only write the table and the figure of existing results",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Train the variants of a suite that have no result, with all seeds of a variant at once.

    Then write the table and the figure. The same command continues after `--minutes`.

    Returns:
        The exit code: 143 until all variants are trained.
    """
    from radiance.ablation.results import ResultFolder, get_code_version
    from radiance.ablation.trial import Trial, run_variant

    address, suite = _load_suite(options.suite)
    variants, scale = _select_variants(options, suite), suite.scales[options.scale]
    if not scale.num_images:
        _print_pod_commands(address, suite, variants)
        return 0
    seeds = tuple(range(scale.num_seeds if options.seeds is None else options.seeds))
    if len(seeds) < 2:
        raise config.ConfigError(f"{address} has {len(seeds)} seeds: intervals need at least two.")
    results = ResultFolder(
        options.results or Path(address).parent / "results" / suite.name / options.scale
    )
    if not options.table:
        commit, deadline = get_code_version(), time.monotonic() + 60 * options.minutes
        for variant in variants:
            print(
                f"{suite.name} {options.scale} {variant}: {len(seeds)} seeds of "
                f"{scale.run.train.steps} steps.",
                flush=True,
            )
            trial = Trial(suite, options.scale, variant, seeds, commit)
            if (
                run_variant(trial, results, options.work, lambda: time.monotonic() > deadline)
                is None
            ):
                print(f"Stopped in variant {variant}: the same command continues.", file=sys.stderr)
                return 143
    return _write_table(suite, options.scale, results)


def _load_suite(suite_address: str) -> tuple[str, Suite]:
    """Return a suite, and its address, to which `radiance train` accepts ":VARIANT"."""
    from radiance.ablation.suite import Suite

    path, _, suite_name = suite_address.partition(":")
    path = path if path.endswith(".py") else f"experiments/ablations/{path}.py"
    module = load_module(path)
    module_suites = (
        {"": module.SUITE} if hasattr(module, "SUITE") else getattr(module, "SUITES", {})
    )
    if not isinstance(module_suites, dict) or not module_suites:
        raise config.ConfigError(f"{path} is not a suite: it has no SUITE.")
    if not all(isinstance(suite, Suite) for suite in module_suites.values()):
        raise config.ConfigError(
            f"{path} is not a suite: its SUITE must be a radiance.ablation.suite.Suite."
        )
    suites = {f"{path}:{name}" if name else path: suite for name, suite in module_suites.items()}
    address = f"{path}:{suite_name}" if suite_name else path
    if address not in suites:
        raise config.ConfigError(f"There is no suite {address}: there is {', '.join(suites)}.")
    suite = suites[address]
    if not isinstance(suite, Suite):
        raise config.ConfigError(
            f"{address} is {type(suite).__name__}: make SUITE a radiance.ablation.suite.Suite."
        )
    return address, suite


def _select_variants(options: argparse.Namespace, suite: Suite) -> list[str]:
    """Return the names of the variants to train."""
    suite_variants = suite.variants_at(options.scale)
    if unknown_variants := [
        variant for variant in options.variants or () if variant not in suite_variants
    ]:
        raise config.ConfigError(
            f"Suite {suite.name} has no variant {', '.join(unknown_variants)}: it has "
            f"{', '.join(suite_variants)}."
        )
    return options.variants or list(suite_variants)


def _write_table(suite: Suite, scale: str, results: ResultFolder) -> int:
    """Write the table and the figure of all results, and print the table."""
    from radiance.ablation.report import draw_figure, format_suite_report
    from radiance.ablation.trial import hash_variant
    from radiance.base.files import replace_atomically

    variant_results = results.read_all(
        {variant: hash_variant(suite, scale, variant) for variant in suite.variants_at(scale)}
    )
    text = format_suite_report(suite, variant_results)
    for name, content in (("table.md", text), ("figure.svg", draw_figure(suite, variant_results))):
        with replace_atomically(results.folder / name) as temp_path:
            temp_path.write_text(content, "utf-8")
    print(text)
    return 0


def _print_pod_commands(address: str, suite: Suite, variants: list[str]):
    """Print the commands of a suite on a pod, where every variant and seed is a separate run."""
    print(
        "Variants of this scale are trained separately, like experiments; `radiance plan` "
        "estimates the cost of each:"
    )
    for variant in variants:
        changes = [f"name={suite.name}-{variant}-SEED", "train.seed=SEED", "data.path=FOLDER"]
        changes += (
            ["text.file=T5"] if suite.variant_config("pod", variant).text.encoder == "t5" else []
        )
        print("  " + shlex.join(["radiance", "train", f"{address}:{variant}", *changes]))
    print(f"SEED: 0 to {suite.scales['pod'].num_seeds - 1}.")
