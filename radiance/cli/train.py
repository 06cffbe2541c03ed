"""`radiance train`: an experiment, from its start or on from where it stopped."""

import argparse
import sys

from radiance import config
from radiance.cli.experiments import experiment
from radiance.cli.hosts import add_hosts, join_hosts, keep_memory


def add(verbs):
    parser = verbs.add_parser("train", help="train an experiment, or go on with it", description=main.__doc__)
    parser.add_argument("experiment", metavar="EXPERIMENT[:ARM…]", help="a file of experiments/, or its dotted name")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="changes of its config, such as optimizer.learning_rate=2e-4")
    add_hosts(parser)
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Trains an experiment in its run directory; the same command goes on where it stopped. Exit code 143 after SIGTERM."""
    from radiance.evaluation.report import write_report
    from radiance.training.loop import train

    run = config.override(experiment(options.experiment), options.changes)
    first_host = join_hosts(options)[0] == 0
    keep_memory()
    reached = train(run)
    if not first_host:
        return 0 if reached == run.train.steps else 143
    if reached < run.train.steps:
        print(f"Stopped at step {reached}: the same command goes on.", file=sys.stderr)
        return 143
    print(f"{run.directory} is trained for {reached} steps; see {write_report(run.directory)}.")
    return 0
