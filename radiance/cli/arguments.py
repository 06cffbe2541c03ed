"""Arguments that several verbs share, and the parsers of their values."""

import argparse
import math
from pathlib import Path
from typing import Any

from radiance import config

CHANGES_METAVAR = "key=value"
EXPERIMENT_METAVAR = "EXPERIMENT[:VARIANT…]"


def add_verb(
    subparsers: Any, name: str, help_text: str, description: str | None, *examples: str
) -> argparse.ArgumentParser:
    """Add the parser of a verb, whose help ends with example commands.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
        name: The verb.
        help_text: A short description for the list of verbs.
        description: The docstring of its `main`; its first paragraph is shown.
        examples: Commands that work.
    """
    paragraph = " ".join((description or "").split("\n\n")[0].split())
    return subparsers.add_parser(
        name,
        help=help_text,
        description=paragraph,
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
        formatter_class=_HelpFormatter,
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps the description, but not the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def add_changes_argument(parser: argparse.ArgumentParser, example: str):
    """Add key=value changes of settings."""
    parser.add_argument(
        "changes",
        nargs="*",
        metavar=CHANGES_METAVAR,
        help=f"changes of settings, such as {example}",
    )


def add_model_arguments(parser: argparse.ArgumentParser):
    """Add MODEL, and the properties of a model that a checkpoint file may lack."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run directory, or a checkpoint: safetensors (native or diffusers), an index, GGUF",
    )
    parser.add_argument(
        "--text-ids",
        choices=["zero", "sequential"],
        help="rotary indices of text tokens, if the file does not contain them",
    )
    parser.add_argument(
        "--prediction",
        choices=["velocity", "x0"],
        help="output of the network, if the file does not contain it",
    )


def get_model_overrides(options: argparse.Namespace) -> dict[str, str]:
    """Return the properties of the model that the options set."""
    values = {"text_ids": options.text_ids, "prediction": options.prediction}
    return {name: value for name, value in values.items() if value is not None}


def parse_path_with_number(text: str) -> tuple[str, float | None]:
    """Parse FILE:NUMBER, or FILE alone."""
    path, colon, number_text = text.rpartition(":")
    try:
        value = float(number_text) if colon else None
    except ValueError:
        return text, None  # a colon in the name
    if value is None:
        return text, None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{number_text} is not a finite number")
    return path, value


def read_prompts(path: Path) -> list[str]:
    """Read a file with one prompt per line."""
    try:
        return [
            line for line in read_option_file(path).decode("utf-8-sig").splitlines() if line.strip()
        ]
    except UnicodeDecodeError as error:
        raise config.ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from None


def read_option_file(path: Path) -> bytes:
    """Read a file that an option names. Raise ConfigError if that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise config.ConfigError(
            f"{path} cannot be read ({error.strerror}): give an existing file."
        ) from None


def parse_mesh(text: str) -> config.Mesh:
    """Parse a mesh such as "data=2,fsdp=4"."""
    try:
        return config.override(config.Mesh(data=1, fsdp=1, tensor=1), text.split(","))
    except config.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_seeds(text: str) -> list[int]:
    """Parse seeds such as "0-3" or "1,5,9"."""
    values = []
    try:
        for item in text.split(","):
            low, dash, high = item.partition("-")
            values += range(int(low), int(high) + 1) if dash else [int(low)]
    except ValueError:
        values = []
    if not values or max(values) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"{text!r}: seeds are whole numbers below 2**32, such as 0-3 or 1,5,9"
        )
    return values


def parse_size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT, or the side of a square, in pixels."""
    width, _, height = text.lower().partition("x")
    try:
        dimensions = int(width), int(height or width)
    except ValueError:
        dimensions = 0, 0
    if min(dimensions) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: a size is WIDTHxHEIGHT in pixels, such as 1024x768"
        )
    return dimensions
