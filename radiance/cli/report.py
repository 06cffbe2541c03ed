"""`radiance report`: show runs as a web page."""

import argparse
from pathlib import Path

from radiance.cli.arguments import add_verb


def add_parser(subparsers):
    """Add the arguments of `radiance report`."""
    parser = add_verb(
        subparsers,
        "report",
        "write report.html of one run, or of several runs",
        main.__doc__,
        "radiance report runs/quickstart",
        "radiance report runs/a runs/b --out comparison.html",
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="run directories; several are compared"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page; by default report.html in the first run directory",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Write one page with curves, samples, settings and environments; it needs no network."""
    import jax

    from radiance.evaluation.report import write_report

    jax.config.update("jax_platforms", "cpu")  # a running training may use the accelerators
    print(write_report(*options.runs, out=options.out))
    return 0
