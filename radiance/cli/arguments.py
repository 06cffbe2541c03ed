"""Arguments that several verbs share, and the parsers of their values."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from radiance import config
from radiance.base.files import read_file
from radiance.base.text_files import decode_text, split_lines

CHANGES_METAVAR = "key=value"
EXPERIMENT_METAVAR = "EXPERIMENT[:VARIANT…]"
MAX_SEED = 2**32 - 1
MAX_SEEDS = 1_000_000  # of a prompt
MAX_SIDE = 16_384  # pixels
MAX_DEVICES = 16_384


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
        default=[],  # without a default, argparse reports it as missing
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
    lines = split_lines(decode_text(read_option_file(path), path))
    return [line for line in lines if line.strip()]


def read_option_file(path: Path) -> bytes:
    """Read a file that an option names. Raise ConfigError if that fails."""
    try:
        return read_file(path)
    except OSError as error:
        raise config.ConfigError(
            f"{path} cannot be read ({error.strerror}): give an existing file."
        ) from None


def parse_mesh(text: str) -> config.Mesh:
    """Parse a mesh such as "data=2,fsdp=4"."""
    try:
        mesh = config.override(config.Mesh(data=1, fsdp=1, tensor=1), text.split(","))
    except config.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if abs(mesh.data * mesh.fsdp * mesh.tensor) > MAX_DEVICES:
        raise argparse.ArgumentTypeError(f"{_shorten(text)} has more than {MAX_DEVICES} devices")
    return mesh


def parse_whole_number(minimum: int, maximum: int) -> Callable[[str], int]:
    """Return a parser of whole numbers in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(
                f"{_shorten(text)} is not a whole number from {minimum} to {maximum}"
            )
        return value

    return parse


def parse_duration(text: str) -> float:
    """Parse a duration: a number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{_shorten(text)} is not a number of at least 0")
    return value


def _shorten(text: str) -> str:
    """Quote a word of the command line for a message."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def parse_seeds(text: str) -> list[int]:
    """Parse seeds such as "0-3" or "1,5,9"."""
    ranges = []
    try:
        for item in text.split(","):
            low, dash, high = item.partition("-")
            ranges.append(range(int(low), int(high if dash else low) + 1))
    except ValueError:
        ranges = []
    if not any(ranges) or any(seeds.stop - 1 > MAX_SEED for seeds in ranges):
        raise argparse.ArgumentTypeError(
            f"{_shorten(text)}: seeds are whole numbers below 2**32, such as 0-3 or 1,5,9"
        )
    if sum(max(seeds.stop - seeds.start, 0) for seeds in ranges) > MAX_SEEDS:
        raise argparse.ArgumentTypeError(
            f"{_shorten(text)} are more than {MAX_SEEDS:,} seeds: give them in several commands"
        )
    return [seed for seeds in ranges for seed in seeds]


def parse_size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT, or the side of a square, in pixels."""
    width, _, height = text.lower().partition("x")
    try:
        dimensions = int(width), int(height or width)
    except ValueError:
        dimensions = 0, 0
    if min(dimensions) < 1 or max(dimensions) > MAX_SIDE:
        raise argparse.ArgumentTypeError(
            f"{_shorten(text)}: a size is WIDTHxHEIGHT in pixels, such as 1024x768, of at most "
            f"{MAX_SIDE} pixels each"
        )
    return dimensions
