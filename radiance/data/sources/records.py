"""Annotations of images in JSON lines or table rows, and index records that are built from them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from radiance.base.errors import TextError
from radiance.base.text_files import check_text, decode_text, split_lines
from radiance.data import storage
from radiance.data.listing import IndexRecord, UnusableRecord, read_image_header
from radiance.data.unusable import UnusableError

# Fields that may hold the captions. The first one that is not empty counts.
CAPTION_FIELDS = ("caption_or_tags", "text", "caption")
FLAG_TEXTS = {"true": True, "false": False, "1": True, "0": False, "": False}
MAX_TEXT_BYTES = 2**20  # of a caption file, or of a line of a list
MISSING_FILE, UNREADABLE_FILE = "missing file", "unreadable file"
MISSING_PACKAGE = "protocol without an installed package"
UNREADABLE_KINDS = (MISSING_FILE, UNREADABLE_FILE, MISSING_PACKAGE)


class Annotation(NamedTuple):
    """The captions of an image and how to use them."""

    captions: tuple[str, ...] = ()  # as written, possibly empty
    has_tags: bool = False  # captions are lists of tags with commas between them
    loss_weight: float = 1.0


class MetadataEntry(NamedTuple):
    """The content of a line of JSON about one image."""

    filename: str
    annotation: Annotation
    width: int  # pixels; 0 if it is not given
    height: int


def make_record(
    name: str,
    location: Any,
    read_annotation: Callable[[], Annotation],
    read_header: Callable[[], tuple[int, int, str]],
    attributes: Mapping[str, Any] | None = None,
    split_hash: int | None = None,
) -> IndexRecord | UnusableRecord:
    """Build the record of an image from its annotation and its header.

    Args:
        name: Name of the image within its dataset.
        location: JSON value by which the listing finds the image's file, or the file's bytes.
        read_annotation: Returns the annotation, or raises UnusableError. It is called first.
        read_header: Returns width, height and content hash, or raises UnusableError. It is only
            called for an image whose annotation can be used.
        attributes: Further known attributes of the image.
        split_hash: Hash that decides the split; by default the name's.

    Returns:
        The record, or the reason why the image cannot be used.
    """
    try:
        annotation = read_annotation()
        captions = clean_captions(annotation.captions)
        loss_weight = validate_weight(annotation)
        width, height, content_hash = read_header()
    except UnusableError as error:
        is_unreadable = error.kind in UNREADABLE_KINDS or not error.address
        state = "" if is_unreadable else storage.get_file_state(error.address)
        return UnusableRecord(name, error.kind, error.address, state)
    return IndexRecord(
        name,
        location,
        captions,
        width,
        height,
        annotation.has_tags,
        loss_weight,
        content_hash,
        dict(attributes or {}),
        split_hash,
    )


def parse_annotation(record: Any) -> Annotation:
    """Parse the fields of a record that annotate an image; every field may be missing.

    Args:
        record: A mapping with a text or several under one of CAPTION_FIELDS, `is_tag_based` and
            `loss_weight`.

    Raises:
        UnusableError: The record or one of its fields has another type.
    """
    if not isinstance(record, Mapping):
        raise UnusableError("bad record")
    captions = next((record[field] for field in CAPTION_FIELDS if record.get(field)), ())
    weight = record.get("loss_weight")
    return Annotation(
        _parse_texts(captions),
        _parse_flag(record.get("is_tag_based")),
        1.0 if weight is None else _parse_number(weight),
    )


def parse_json_object(content: bytes) -> Mapping[str, Any]:
    """Parse a JSON object in UTF-8.

    Raises:
        UnusableError: The content is something else, or an object has two fields of one name.
    """
    try:
        record = json.loads(decode_text(content, "JSON"), object_pairs_hook=_make_object)
    except (ValueError, RecursionError):
        raise UnusableError("bad record") from None
    if not isinstance(record, dict):
        raise UnusableError("bad record")
    return record


def parse_entry(line: bytes | None) -> MetadataEntry:
    """Parse a line of JSON about one image; None stands for a line that is too long.

    The names of fields are those of the published models' trainer, or of Hugging Face's
    `imagefolder`: `filename` or `file_name`, the fields of `parse_annotation`, and optionally
    `width` and `height`.

    Raises:
        UnusableError: The line is not such an object.
    """
    if line is None:
        raise UnusableError("bad record")
    record = parse_json_object(line)
    filename = record.get("filename") or record.get("file_name")
    if not isinstance(filename, str) or "\0" in filename:
        raise UnusableError("bad record")
    try:
        filename.encode("utf-8", "surrogateescape")
    except UnicodeError:
        raise UnusableError("bad record") from None
    return MetadataEntry(
        filename,
        parse_annotation(record),
        _parse_pixels(record.get("width")),
        _parse_pixels(record.get("height")),
    )


def decode_lines(content: bytes) -> tuple[str, ...]:
    """Decode the lines of a caption file.

    Raises:
        UnusableError: The file is not in UTF-8.
    """
    try:
        return tuple(split_lines(decode_text(content, "caption")))
    except TextError:
        raise UnusableError("caption not in UTF-8") from None


def clean_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Strip captions of white space and drop the empty ones.

    Raises:
        UnusableError: No caption is left, or one cannot be encoded.
    """
    captions = tuple(text for text in map(str.strip, texts) if text)
    if not captions:
        raise UnusableError("empty caption")
    try:
        check_text("".join(captions), "caption")
    except TextError:
        raise UnusableError("caption not in UTF-8") from None
    return captions


def validate_weight(annotation: Annotation) -> float:
    """Return the loss weight.

    Raises:
        UnusableError: The weight is not a positive normal float32.
    """
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= annotation.loss_weight <= float(limits.max):
        raise UnusableError("loss_weight not above 0")
    return annotation.loss_weight


def read_header_at(address: str, size: int | None = None) -> tuple[int, int, str]:
    """Read the header of an image's file.

    Args:
        address: Path or URL.
        size: Size of the file in bytes, if it is known.

    Returns:
        Width and height in pixels, upright, and a hash of the part that was read.

    Raises:
        UnusableError: The file is missing, unreadable or not an image.
        UnreachableError: A remote file may exist but cannot be read.
    """
    with translate_file_errors(address), storage.open_seekable(address, size) as file:
        return read_image_header(file)


@contextmanager
def translate_file_errors(address: str) -> Iterator[None]:
    """Raise UnusableError, with the address, if a file is missing, unreadable or not an image."""
    kind = ""
    try:
        yield
    except storage.UnreachableError:
        raise
    except UnusableError as error:
        error.address = address
        raise
    except (FileNotFoundError, NotADirectoryError):
        kind = MISSING_FILE
    except OSError:
        kind = UNREADABLE_FILE
    except storage.MissingPackageError:
        kind = MISSING_PACKAGE
    if kind:
        error = UnusableError(kind)
        error.address = address
        raise error


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("two fields of one name")
    return fields


def _parse_flag(value: Any) -> bool:
    """Parse a boolean. Tables write it as 0 or 1, or as a text."""
    if isinstance(value, str):
        value = FLAG_TEXTS.get(value.strip().lower(), value)
    if value is None or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise UnusableError("bad record")


def _parse_texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(
        text is None or isinstance(text, str) for text in texts
    ):
        raise UnusableError("bad record")
    return tuple(text for text in texts if text is not None)


def _parse_pixels(value: Any) -> int:
    """Parse a whole number. Spreadsheets write it as a float, and a missing one as NaN."""
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
