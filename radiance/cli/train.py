"""`radiance train`: an experiment, from its start or on from where it stopped."""

import argparse
import sys

from radiance import config
from radiance.cli.hosts import (
    add_host_arguments,
    join_hosts_from_options,
    retain_freed_memory_on_cpu,
)
from radiance.config.experiments import load_experiment


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "train", help="train an experiment, or go on with it", description=main.__doc__
    )
    parser.add_argument(
        "experiment", metavar="EXPERIMENT[:ARM…]", help="a file of experiments/, or its dotted name"
    )
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="key=value",
        help="changes of its config, such as optimizer.learning_rate=2e-4",
    )
    add_host_arguments(parser)
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Trains an experiment in its run directory; the same command goes on where it stopped. Exit code 143 after SIGTERM."""
    from radiance.evaluation.report import write_report
    from radiance.training.loop import train

    run = config.override(load_experiment(options.experiment), options.changes)
    is_first_host = join_hosts_from_options(options)[0] == 0
    retain_freed_memory_on_cpu()
    last_step = train(run)
    if not is_first_host:
        return 0 if last_step == run.train.steps else 143
    if last_step < run.train.steps:
        print(f"Stopped at step {last_step}: the same command goes on.", file=sys.stderr)
        return 143
    print(f"{run.run_dir} is trained for {last_step} steps; see {write_report(run.run_dir)}.")
    return 0
