"""`radiance verify`: this installation against golden files."""

import argparse


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "verify", help="compare with golden files", description=main.__doc__
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Compares this installation's outputs with the published implementation's. Exit code 1 when one is too far off."""
    from radiance.evaluation.verify import verify_golden_file

    results = [result for file in options.files for result in verify_golden_file(file)]
    for r in results:
        print(
            f"{r.file:40} {r.output:10} {r.error:.1e} of {r.tolerance:.1e} (rounding moves it by {r.rounding_error:.1e})  {'ok' if r.is_within_tolerance else 'TOO FAR'}"
        )
    return 0 if all(r.is_within_tolerance for r in results) else 1
