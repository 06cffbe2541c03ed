"""`radiance verify`: compare this installation with golden files."""

import argparse

from radiance.cli.arguments import add_verb


def add_parser(subparsers):
    """Add the arguments of `radiance verify`."""
    parser = add_verb(
        subparsers,
        "verify",
        "compare outputs with golden files",
        main.__doc__,
        "radiance verify tests/golden/*.safetensors",
        "radiance verify golden.safetensors",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="files with inputs and outputs of a reference"
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Compare this installation's outputs with those of the published implementation.

    Returns:
        The exit code: 1 when a difference exceeds its tolerance.
    """
    from radiance.evaluation.verify import verify_golden_file

    results = [result for file in options.files for result in verify_golden_file(file)]
    for r in results:
        print(
            f"{r.file:40} {r.output:10} {r.error:.1e} of {r.tolerance:.1e} "
            f"(rounding changes it by {r.rounding_error:.1e})  "
            f"{'ok' if r.is_within_tolerance else 'TOO FAR'}"
        )
    return 0 if all(r.is_within_tolerance for r in results) else 1
