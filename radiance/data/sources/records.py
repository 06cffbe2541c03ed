"""What is said of an image beside it, in a line of JSON or in a row of a table, and what its head shows."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from radiance.data import storage
from radiance.data.decode import UnusableError
from radiance.data.listing import read_image_header

CAPTION_FIELDS = ("caption_or_tags", "text", "caption")  # the first of them that says anything


class Annotation(NamedTuple):
    captions: tuple[str, ...] = ()  # as they stand there
    has_tags: bool = False  # whether they are lists of tags with commas between
    loss_weight: float = 1.0  # of the image's loss


class MetadataEntry(NamedTuple):
    """What a line of JSON says of an image."""

    filename: str
    annotation: Annotation
    width: int  # pixels; 0 when it says none
    height: int


def parse_annotation(record: Any) -> Annotation:
    """Of a mapping with a text, or several, under one of CAPTION, with `is_tag_based` and with `loss_weight`, which all may be left out.

    Raises Broken when it is no such thing.
    """
    if not isinstance(record, Mapping):
        raise UnusableError("bad record")
    captions = next((record[field] for field in CAPTION_FIELDS if record.get(field)), ())
    weight = record.get("loss_weight")
    return Annotation(
        _parse_texts(captions),
        bool(record.get("is_tag_based")),
        1.0 if weight is None else _parse_number(weight),
    )


def parse_json_object(content: bytes) -> Mapping[str, Any]:
    """An object in JSON. Raises Broken when it is none."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise UnusableError("bad record") from None
    if not isinstance(record, dict):
        raise UnusableError("bad record")
    return record


def parse_entry(line: bytes) -> MetadataEntry:
    """The names of its fields are those of the published trainer's lists, or of Hugging Face's `imagefolder`: filename or file_name, what
    `said` reads, and width and height, which may be left out. Raises Broken when it says no such thing.
    """
    record = parse_json_object(line)
    filename = record.get("filename") or record.get("file_name")
    try:
        os.fsencode(filename)
        if "\0" in filename:
            raise ValueError(filename)
    except (TypeError, ValueError):
        raise UnusableError("bad record") from None
    return MetadataEntry(
        filename,
        parse_annotation(record),
        _parse_pixels(record.get("width")),
        _parse_pixels(record.get("height")),
    )


def decode_lines(content: bytes) -> list[str]:
    """Of a text file. Raises Broken."""
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeError:
        raise UnusableError("caption not in UTF-8") from None


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Those that say something. Raises Broken when there is none."""
    captions = tuple(text for text in map(str.strip, texts) if text)
    if not captions:
        raise UnusableError("empty caption")
    try:
        "".join(captions).encode()
    except UnicodeError:
        raise UnusableError("caption not in UTF-8") from None
    return captions


def validate_weight(annotation: Annotation) -> float:
    """Raises Broken for a weight that would teach nothing or break everything."""
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= annotation.loss_weight <= float(limits.max):
        raise UnusableError("loss_weight not above 0")
    return annotation.loss_weight


def read_header_at(address: str, size: int | None = None) -> tuple[int, int, str]:
    """Of an image's file: width and height, upright, and a digest of as much of it as was read.

    size: in bytes, where it is known. Raises Broken, and Unreachable when a remote file may be there and cannot be read.
    """
    try:
        with storage.open_seekable(address, size) as file:
            return read_image_header(file)
    except storage.UnreachableError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableError("missing file") from None
    except OSError:
        raise UnusableError("unreadable file") from None


def _parse_texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(
        text is None or isinstance(text, str) for text in texts
    ):
        raise UnusableError("bad record")
    return tuple(text for text in texts if text is not None)


def _parse_pixels(value: Any) -> int:
    """Spreadsheets make floats of whole numbers, and NaN of nothing."""
    number = 0.0 if value is None else _parse_number(value)
    if math.isnan(number):
        return 0
    if number < 0 or not number.is_integer():
        raise UnusableError("bad record")
    return int(number)


def _parse_number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UnusableError("bad record")
    try:
        return float(value)
    except OverflowError:
        raise UnusableError("bad record") from None
