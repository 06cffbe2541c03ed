"""Records: what a line of JSON, a file beside a picture, or a row of a table says of it."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from radiance.data.decode import Broken

CAPTION = ("caption_or_tags", "text", "caption")  # the first of them that says anything


class Said(NamedTuple):
    captions: tuple[str, ...] = ()  # those that are not empty
    tags: bool = False
    weight: float = 1.0


def said(record: Any) -> Said:
    """Of a mapping with a caption, or several, under one of CAPTION, and with `is_tag_based` and `loss_weight` where they are known.

    Raises Broken for captions that are no texts and for weights below 0.
    """
    if not isinstance(record, Mapping):
        raise Broken("bad record")
    captions = next((record[name] for name in CAPTION if record.get(name)), ())
    weight = 1.0 if record.get("loss_weight") is None else record["loss_weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise Broken("bad loss weight")
    return Said(texts(captions), bool(record.get("is_tag_based")), float(weight))


def parsed(content: bytes) -> Said:
    """Of a record in JSON."""
    try:
        return said(json.loads(content))
    except (ValueError, RecursionError):
        raise Broken("bad record") from None


def texts(value: Any) -> tuple[str, ...]:
    """Of a text or several, those that are not empty."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)) or not all(text is None or isinstance(text, str) for text in several):
        raise Broken("caption that is no text")
    return tuple(text.strip() for text in several if text and text.strip())


def lines(content: bytes) -> tuple[str, ...]:
    """The captions of a text file: one a line."""
    try:
        return texts(content.decode("utf-8-sig").splitlines())
    except UnicodeError:
        raise Broken("caption not in UTF-8") from None
