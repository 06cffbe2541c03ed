"""`radiance train`: train an experiment, or resume it."""

import argparse
import sys

from radiance import config
from radiance.cli.arguments import EXPERIMENT_METAVAR, add_changes_argument, add_verb
from radiance.cli.hosts import add_host_arguments, join_hosts_from_options
from radiance.config.experiments import load_experiment


def add_parser(subparsers):
    """Add the arguments of `radiance train`."""
    parser = add_verb(
        subparsers,
        "train",
        "train an experiment, or resume it",
        main.__doc__,
        "radiance train experiments/quickstart.py",
        "radiance train experiments/quickstart.py name=fast optimizer.learning_rate=2e-3",
        "radiance train experiments.radiance_512 data.path=photos text.file=t5.safetensors",
    )
    parser.add_argument(
        "experiment",
        metavar=EXPERIMENT_METAVAR,
        help="a file, such as experiments/quickstart.py, or its dotted name; with variants",
    )
    add_changes_argument(parser, "optimizer.learning_rate=2e-4")
    parser.add_argument(
        "--allow-changes",
        default="",
        metavar="NAMES",
        help="resume although these settings, sections or data differ, such as "
        "data,optimizer.learning_rate; the run records it",
    )
    add_host_arguments(parser)
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Train an experiment in its run directory. The same command resumes a run that has stopped.

    Returns:
        The exit code: 0 when all steps are done, 143 after a stop by SIGTERM or Ctrl-C.
    """
    from radiance.distributed.hosts import retain_freed_memory_on_cpu
    from radiance.evaluation.report import write_report
    from radiance.training.loop import train

    run = config.override(load_experiment(options.experiment), options.changes)
    is_first_host = join_hosts_from_options(options)[0] == 0
    retain_freed_memory_on_cpu()
    allowed_changes = [name for name in options.allow_changes.split(",") if name]
    last_step = train(run, allowed_changes)
    is_complete = last_step >= run.train.steps
    if is_first_host and is_complete:
        print(f"{run.run_dir} is trained for {last_step} steps; see {write_report(run.run_dir)}.")
    elif is_first_host:
        print(f"Stopped at step {last_step}: the same command resumes the run.", file=sys.stderr)
    return 0 if is_complete else 143
