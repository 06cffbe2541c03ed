"""`radiance report`: runs as a page."""

import argparse
from pathlib import Path


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "report", help="write a run's report.html, or one of several runs", description=main.__doc__
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="several are laid over each other"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="by default report.html in the first run's directory",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Writes one page without scripts or network: curves, images, config, and what the run was made with."""
    import jax

    from radiance.evaluation.report import write_report

    jax.config.update("jax_platforms", "cpu")  # the accelerators may be the run's that is watched
    print(write_report(*options.runs, out=options.out))
    return 0
