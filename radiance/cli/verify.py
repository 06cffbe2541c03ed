"""`radiance verify`: this installation against golden files."""

import argparse


def add(verbs):
    parser = verbs.add_parser("verify", help="compare with golden files", description=main.__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Compares this installation's outputs with the published implementation's. Exit code 1 when one is too far off."""
    from radiance.evaluation.verify import verify

    results = [result for file in options.files for result in verify(file)]
    for r in results:
        print(
            f"{r.file:40} {r.output:10} {r.error:.1e} of {r.tolerance:.1e} (rounding moves it by {r.rounding:.1e})  {'ok' if r.good else 'TOO FAR'}"
        )
    return 0 if all(r.good for r in results) else 1
