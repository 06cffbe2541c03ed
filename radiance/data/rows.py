"""What is learned of a picture before it is decoded: from a line of JSON, and from its head."""

import json
import math
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from radiance.data import decode, storage
from radiance.data.catalogue import head_of

BAD = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)  # what `entry_of` raises


class Entry(NamedTuple):
    """What a line of JSON says of a picture."""

    file: str
    captions: list[str]
    tags: bool
    width: int  # pixels; 0 when it says none
    height: int
    weight: float


def entry_of(line: bytes) -> Entry:
    """The names of its fields are those of the published trainer's lists, or of Hugging Face's `imagefolder`.

    filename or file_name; caption_or_tags, text or caption: a text or a list of texts; is_tag_based, width, height and loss_weight,
    which may be left out. Raises one of BAD when the line says no such thing.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError(f"{row!r} is no object")
    file = row.get("filename") or row["file_name"]
    if not isinstance(file, str) or "\0" in file:
        raise TypeError(f"{file!r} is no name of a file")
    os.fsencode(file)
    weight = row.get("loss_weight")
    return Entry(
        file,
        _texts(row.get("caption_or_tags") or row.get("text") or row.get("caption")),
        bool(row.get("is_tag_based")),
        _pixels(row.get("width")),
        _pixels(row.get("height")),
        1.0 if weight is None else _number(weight),
    )


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{value!r} is no caption")
    return texts


def _pixels(value: Any) -> int:
    """Spreadsheets make floats of whole numbers, and NaN of nothing."""
    number = 0 if value is None else _number(value)
    if math.isnan(number):
        return 0
    if number < 0 or number != int(number):
        raise ValueError(f"{value!r} is no number of pixels")
    return int(number)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def captions_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Those that say something. Raises Broken when there is none."""
    captions = tuple(text for text in map(str.strip, texts) if text)
    if not captions:
        raise decode.Broken("empty caption")
    try:
        "".join(captions).encode()
    except UnicodeError:
        raise decode.Broken("caption not in UTF-8") from None
    return captions


def weight_of(entry: Entry) -> float:
    """Raises Broken for a weight that would teach nothing or break everything."""
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= entry.weight <= float(limits.max):
        raise decode.Broken("loss_weight not above 0")
    return entry.weight


class Look(NamedTuple):
    """What the head of a file shows."""

    width: int  # pixels, upright
    height: int
    content: str  # a digest of as much of the file as was read


def look_at(address: str, size: int | None = None) -> Look:
    """size: of the file, in bytes, where it is known. Raises Broken, and Unreachable when a remote file may be there and cannot be read."""
    try:
        with storage.open_head(address, size) as opened:
            return Look(*head_of(opened))
    except storage.Unreachable:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise decode.Broken("missing file") from None
    except OSError:
        raise decode.Broken("unreadable file") from None
