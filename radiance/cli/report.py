"""`radiance report`: a run as a page."""

import argparse
from pathlib import Path


def add(verbs):
    parser = verbs.add_parser("report", help="write a run's report.html", description=main.__doc__)
    parser.add_argument("run_directory", metavar="RUN", type=Path)
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Writes report.html into the run directory: curves, pictures, config."""
    from radiance.evaluation.report import write_report

    print(write_report(options.run_directory))
    return 0
