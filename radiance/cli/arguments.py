"""Arguments that several verbs have, and how their words are read."""

import argparse
import math
from pathlib import Path

from radiance import config


def add_model_arguments(parser: argparse.ArgumentParser):
    """MODEL, and what the user may have to tell of it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run directory, or a checkpoint: safetensors (native or diffusers), an index, GGUF",
    )
    parser.add_argument(
        "--text-ids", choices=["zero", "sequential"], help="where a file does not say it"
    )
    parser.add_argument(
        "--prediction", choices=["velocity", "x0"], help="where a file does not say it"
    )


def get_model_overrides(options: argparse.Namespace) -> dict[str, str]:
    values = {"text_ids": options.text_ids, "prediction": options.prediction}
    return {name: value for name, value in values.items() if value is not None}


def parse_path_with_number(text: str) -> tuple[str, float | None]:
    """FILE:NUMBER, or FILE alone."""
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
    """The prompts of a file, one a line."""
    try:
        return [
            line for line in read_option_file(path).decode("utf-8-sig").splitlines() if line.strip()
        ]
    except UnicodeDecodeError as error:
        raise config.ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8."
        ) from None


def read_option_file(path: Path) -> bytes:
    """A file that an option names."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise config.ConfigError(
            f"{path} cannot be read ({error.strerror}): give a file that is there."
        ) from None


def parse_mesh(text: str) -> config.Mesh:
    try:
        return config.override(config.Mesh(data=1, fsdp=1, tensor=1), text.split(","))
    except config.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_seeds(text: str) -> list[int]:
    values = []
    for item in text.split(","):
        low, dash, high = item.partition("-")
        values += range(int(low), int(high) + 1) if dash else [int(low)]
    if not values or max(values) >= 2**32:
        raise argparse.ArgumentTypeError("seeds are whole numbers below 2**32")
    return values


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    dimensions = int(width), int(height or width)
    if min(dimensions) < 1:
        raise argparse.ArgumentTypeError("a size is WIDTHxHEIGHT in pixels")
    return dimensions
