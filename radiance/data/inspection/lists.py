"""Lists of images, written as `jsonl` reads them and as the published models' trainer does: one JSON object a line."""

import json
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from radiance import config
from radiance.base.files import replace_atomically
from radiance.data.datasets import dataset_title
from radiance.data.source import Source


def check_list_path(path: Path, source: Source, source_settings: Sequence[config.MixtureSource]):
    """Raises ConfigError when no list of these images can be written there. source: of as many spans as there are parts."""
    if path.is_dir():
        raise config.ConfigError(
            f"{path} is a folder: give the name of a file, such as {path / 'kept.jsonl'}."
        )
    for settings, span in zip(source_settings, source.spans):
        if source.address(span.start) is None:
            raise config.ConfigError(
                f"The images of {dataset_title(settings)} are no files that a list could name: it can be written of data.source=folder and jsonl alone."
            )
        if settings.path and path.resolve() == Path(settings.path).expanduser().resolve():
            raise config.ConfigError(f"{path} is the list that is read: give another name.")


def write_list(
    path: Path,
    source: Source,
    indices: Sequence[int],
    progress: Callable[[int], Any] = lambda indices: None,
) -> int:
    """The file appears when it is whole. Images below its folder are named from there, and others by their whole path: the list
    needs no data.root. How many images have other names than in the source, by which they may come into the other split.

    progress: is called with the number just written.
    """
    folder, num_renamed = os.path.abspath(path.parent), 0
    with replace_atomically(path) as temp_path, temp_path.open("w", encoding="utf-8") as file:
        for index in indices:
            captions, filename = source.captions(index), _filename(source.address(index), folder)
            num_renamed += unicodedata.normalize("NFC", filename) != source.name(index)
            width, height = source.sizes[index].tolist()
            entry = {
                "filename": filename,
                "caption_or_tags": captions[0] if len(captions) == 1 else captions,
                "width": width,
                "height": height,
                "is_tag_based": source.has_tags(index),
                "loss_weight": float(
                    str(source.loss_weights[index])
                ),  # 0.1, not all digits of the nearest float32
            }
            file.write(json.dumps(entry) + "\n")
            progress(1)
    return num_renamed


def _filename(address: str, folder: str) -> str:
    if "://" in address:
        return address
    absolute_path = os.path.abspath(address)
    relative_path = os.path.relpath(absolute_path, folder)
    return absolute_path if relative_path.startswith(os.pardir) else relative_path
