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
    from radiance.ablation.suite import Scale, Suite

MAX_ABLATION_SEEDS = 1000  # which are trained at once


def add_parser(subparsers):
    """Add the arguments of `radiance ablate`."""
    parser = add_verb(
        subparsers,
        "ablate",
        "run an ablation suite, or continue it",
        main.__doc__,
        "radiance ablate masking",
        "radiance ablate masking --scale cpu --gate",
        "radiance ablate experiments/ablations/masking.py --variants one_pad off --seeds 5",
    )
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help="a name such as masking (experiments/ablations/masking.py), or a file; :NAME selects "
        "one of several",
    )
    parser.add_argument(
        "--scale",
        choices=("smoke", "cpu", "gpu", "pod"),
        help="size of the models and of the training: minutes or hours of two cores, a GPU, a pod "
        "(default: the smallest that the suite has)",
    )
    parser.add_argument(
        "--seeds",
        type=parse_whole_number(2, MAX_ABLATION_SEEDS),
        metavar="N",
        help="number of seeds, at least 2; by default that of the suite",
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
        help="folder of the results; by default results/SUITE/SCALE beside the suite's file, and "
        "its folder gate with --gate",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/ablations"),
        metavar="FOLDER",
        help="folder of checkpoints (default: runs/ablations)",
    )
    parser.add_argument(
        "--gate",
        action="store_true",
        help="train the variants of the suite's gate on four other seeds, and report how many "
        "seeds the question needs",
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
    options.scale = _select_scale(options.scale, suite)
    variants, scale = _select_variants(options, suite), suite.scales[options.scale]
    if not scale.num_images:
        _print_pod_commands(address, suite, options.scale, variants)
        return 0
    seeds = _select_seeds(options, scale)
    folder = Path(address).parent / "results" / suite.name / options.scale
    results = ResultFolder(options.results or (folder / "gate" if options.gate else folder))
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
    if options.gate:
        return _write_gate(suite, options.scale, results)
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


def _select_scale(name: str | None, suite: Suite) -> str:
    """Return the scale of an option, or the smallest of the suite."""
    from radiance.ablation.suite import SCALES

    if name is None:
        return next(scale for scale in SCALES if scale in suite.scales)
    if name not in suite.scales:
        raise config.ConfigError(
            f"Suite {suite.name} has no scale {name}: choose {' or '.join(suite.scales)}."
        )
    return name


def _select_seeds(options: argparse.Namespace, scale: Scale) -> tuple[int, ...]:
    """Return the seeds to train. Raise ConfigError if there are fewer than two."""
    from radiance.ablation.suite import GATE_SEEDS

    if options.gate:
        if options.seeds is not None:
            raise config.ConfigError("The gate has its own seeds: leave out --seeds.")
        return GATE_SEEDS
    num_seeds = scale.num_seeds if options.seeds is None else options.seeds
    if num_seeds < 2:
        raise config.ConfigError(
            f"{options.suite} has {num_seeds} seeds: intervals need at least two."
        )
    return tuple(range(scale.first_seed, scale.first_seed + num_seeds))


def _select_variants(options: argparse.Namespace, suite: Suite) -> list[str]:
    """Return the names of the variants to train."""
    suite_variants = suite.variants_at(options.scale)
    if options.gate:
        from radiance.ablation.gate import get_gate

        suite_variants = [suite.base, *get_gate(suite, options.scale).variants]
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


def _write_gate(suite: Suite, scale: str, results: ResultFolder) -> int:
    """Write the report of the gate, and print it."""
    from radiance.ablation.gate import format_gate_report, get_gate
    from radiance.ablation.trial import hash_variant
    from radiance.base.files import replace_atomically

    variants = (suite.base, *get_gate(suite, scale).variants)
    variant_results = results.read_all(
        {variant: hash_variant(suite, scale, variant) for variant in variants}
    )
    text = format_gate_report(suite, scale, variant_results)
    with replace_atomically(results.folder / "gate.md") as temp_path:
        temp_path.write_text(text, "utf-8")
    print(text)
    return 0


def _print_pod_commands(address: str, suite: Suite, scale: str, variants: list[str]):
    """Print the commands of a suite on a pod, where every variant and seed is a separate run."""
    print(
        "Variants of this scale are trained separately, like experiments; `radiance plan` "
        "estimates the cost of each:"
    )
    for variant in variants:
        changes = [f"name={suite.name}-{variant}-SEED", "train.seed=SEED", "data.path=FOLDER"]
        changes += (
            ["text.file=T5"] if suite.variant_config(scale, variant).text.encoder == "t5" else []
        )
        print("  " + shlex.join(["radiance", "train", f"{address}:{variant}", *changes]))
    print(f"SEED: 0 to {suite.scales[scale].num_seeds - 1}.")
