"""What is said of a picture beside it, in a line of JSON or in a row of a table, and what its head shows."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from radiance.data import storage
from radiance.data.catalogue import head_of
from radiance.data.decode import Broken

CAPTION = ("caption_or_tags", "text", "caption")  # the first of them that says anything


class Said(NamedTuple):
    captions: tuple[str, ...] = ()  # as they stand there
    tags: bool = False  # whether they are lists of tags with commas between
    weight: float = 1.0  # of the picture's loss


class Entry(NamedTuple):
    """What a line of JSON says of a picture."""

    file: str
    said: Said
    width: int  # pixels; 0 when it says none
    height: int


def said(record: Any) -> Said:
    """Of a mapping with a text, or several, under one of CAPTION, with `is_tag_based` and with `loss_weight`, which all may be left out.

    Raises Broken when it is no such thing.
    """
    if not isinstance(record, Mapping):
        raise Broken("bad record")
    captions = next((record[name] for name in CAPTION if record.get(name)), ())
    weight = record.get("loss_weight")
    return Said(_texts(captions), bool(record.get("is_tag_based")), 1.0 if weight is None else _number(weight))


def parsed(content: bytes) -> Mapping[str, Any]:
    """An object in JSON. Raises Broken when it is none."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise Broken("bad record") from None
    if not isinstance(record, dict):
        raise Broken("bad record")
    return record


def entry_of(line: bytes) -> Entry:
    """The names of its fields are those of the published trainer's lists, or of Hugging Face's `imagefolder`: filename or file_name, what
    `said` reads, and width and height, which may be left out. Raises Broken when it says no such thing."""
    record = parsed(line)
    file = record.get("filename") or record.get("file_name")
    try:
        os.fsencode(file)
        if "\0" in file:
            raise ValueError(file)
    except (TypeError, ValueError):
        raise Broken("bad record") from None
    return Entry(file, said(record), _pixels(record.get("width")), _pixels(record.get("height")))


def lines(content: bytes) -> list[str]:
    """Of a text file. Raises Broken."""
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeError:
        raise Broken("caption not in UTF-8") from None


def captions_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Those that say something. Raises Broken when there is none."""
    captions = tuple(text for text in map(str.strip, texts) if text)
    if not captions:
        raise Broken("empty caption")
    try:
        "".join(captions).encode()
    except UnicodeError:
        raise Broken("caption not in UTF-8") from None
    return captions


def weight_of(told: Said) -> float:
    """Raises Broken for a weight that would teach nothing or break everything."""
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= told.weight <= float(limits.max):
        raise Broken("loss_weight not above 0")
    return told.weight


def look_at(address: str, size: int | None = None) -> tuple[int, int, str]:
    """Of a picture's file: width and height, upright, and a digest of as much of it as was read.

    size: in bytes, where it is known. Raises Broken, and Unreachable when a remote file may be there and cannot be read.
    """
    try:
        with storage.open_head(address, size) as opened:
            return head_of(opened)
    except storage.Unreachable:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise Broken("missing file") from None
    except OSError:
        raise Broken("unreadable file") from None


def _texts(value: Any) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)) or not all(text is None or isinstance(text, str) for text in several):
        raise Broken("bad record")
    return tuple(text for text in several if text is not None)


def _pixels(value: Any) -> int:
    """Spreadsheets make floats of whole numbers, and NaN of nothing."""
    number = 0.0 if value is None else _number(value)
    if math.isnan(number):
        return 0
    if number < 0 or not number.is_integer():
        raise Broken("bad record")
    return int(number)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Broken("bad record")
    try:
        return float(value)
    except OverflowError:
        raise Broken("bad record") from None
