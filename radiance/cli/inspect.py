"""`radiance inspect`: what a file holds."""

import argparse
from pathlib import Path

from radiance import config


def add(verbs):
    parser = verbs.add_parser("inspect", help="say what a file holds", description=main.__doc__)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, LoRA, T5 or autoencoder file, a run directory, or a size name")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Variant, sizes, parameters by part, types and metadata."""
    from radiance.training.directory import RunDirectory, is_run
    from radiance.weights.inspect import inspect_file, inspect_model

    if options.model in config.MODELS:
        print(inspect_model(config.Model.named(options.model)))
    elif is_run(options.model):
        print(inspect_model(RunDirectory(Path(options.model)).read_config().model))
    else:
        print(inspect_file(options.model))
    return 0
