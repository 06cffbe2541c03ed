"""Lists of pictures, written as `jsonl` reads them and as the published models' trainer does: one JSON object a line."""

import json
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from radiance import config
from radiance.data.datasets import Source, title
from radiance.weights.files import replacing


def check_list(path: Path, source: Source, parts: Sequence[config.Part]):
    """Raises ConfigError when no list of these pictures can be written there. source: of as many spans as there are parts."""
    if path.is_dir():
        raise config.ConfigError(f"{path} is a folder: give the name of a file, such as {path / 'kept.jsonl'}.")
    for part, span in zip(parts, source.spans):
        if source.address(span.first) is None:
            raise config.ConfigError(
                f"The pictures of {title(part)} are no files that a list could name: it can be written of data.source=folder and jsonl alone."
            )
        if part.path and path.resolve() == Path(part.path).expanduser().resolve():
            raise config.ConfigError(f"{path} is the list that is read: give another name.")


def write_list(path: Path, source: Source, pictures: Sequence[int], progress: Callable[[int], Any] = lambda pictures: None) -> int:
    """The file appears when it is whole. Pictures below its folder are named from there, and others by their whole path: the list
    needs no data.root. How many pictures have other names than in the source, by which they may come into the other split.

    progress: is called with the number just written."""
    folder, renamed = os.path.abspath(path.parent), 0
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        for index in pictures:
            captions, name = source.captions(index), _named(source.address(index), folder)
            renamed += unicodedata.normalize("NFC", name) != source.name(index)
            width, height = source.sizes[index].tolist()
            line = {
                "filename": name,
                "caption_or_tags": captions[0] if len(captions) == 1 else captions,
                "width": width,
                "height": height,
                "is_tag_based": source.tags(index),
                "loss_weight": float(str(source.weights[index])),  # 0.1, not all digits of the nearest float32
            }
            file.write(json.dumps(line) + "\n")
            progress(1)
    return renamed


def _named(address: str, folder: str) -> str:
    if "://" in address:
        return address
    whole = os.path.abspath(address)
    inside = os.path.relpath(whole, folder)
    return whole if inside.startswith(os.pardir) else inside
