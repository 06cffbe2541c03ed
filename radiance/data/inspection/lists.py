"""Lists of images in the format of the data source `jsonl`, with one JSON object a line."""

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
    """Check that a list of a source's images can be written.

    Args:
        path: The file that will be written.
        source: The images, with a span for each of the settings.
        source_settings: Settings of each part of the source.

    Raises:
        ConfigError: The images have no files of their own, or the path cannot be used.
    """
    if path.is_dir():
        raise config.ConfigError(
            f"{path} is a folder: give the name of a file, such as {path / 'images.jsonl'}."
        )
    for settings, span in zip(source_settings, source.spans):
        if source.address(span.start) is None:
            raise config.ConfigError(
                f"The images of {dataset_title(settings)} have no files that a list could name: "
                "use data.source=folder or jsonl."
            )
        if settings.path and path.resolve() == Path(settings.path).expanduser().resolve():
            raise config.ConfigError(f"{path} is the list that is read: give another name.")


def write_list(
    path: Path,
    source: Source,
    indices: Sequence[int],
    progress: Callable[[int], Any] = lambda count: None,
) -> int:
    """Write a list of images, which appears when it is complete.

    Images below the list's folder are named relative to it, others by their absolute paths, so
    that the list needs no data.root.

    Args:
        path: The file to write.
        source: The images.
        indices: Indices of the images to list.
        progress: Called with the number of images that are new since the last call.

    Returns:
        The number of images that have another name than in the source. Names decide splits, so
        these images may change theirs.
    """
    folder, num_renamed = os.path.abspath(path.parent), 0
    with replace_atomically(path) as temp_path, temp_path.open("w", encoding="utf-8") as file:
        for index in indices:
            address = source.address(index)
            assert address is not None  # see check_list_path
            filename = _relative_filename(address, folder)
            num_renamed += unicodedata.normalize("NFC", filename) != source.name(index)
            file.write(json.dumps(_make_entry(source, index, filename)) + "\n")
            progress(1)
    return num_renamed


def _make_entry(source: Source, index: int, filename: str) -> dict[str, Any]:
    captions = source.captions(index)
    width, height = source.sizes[index].tolist()
    return {
        "filename": filename,
        "caption_or_tags": captions[0] if len(captions) == 1 else captions,
        "width": width,
        "height": height,
        "is_tag_based": source.has_tags(index),
        # By way of a string, to write 0.1 and not all digits of the nearest float32.
        "loss_weight": float(str(source.loss_weights[index])),
    }


def _relative_filename(address: str, folder: str) -> str:
    if "://" in address:
        return address
    absolute_path = os.path.abspath(address)
    relative_path = os.path.relpath(absolute_path, folder)
    path = absolute_path if relative_path.startswith(os.pardir) else relative_path
    return os.fsencode(path).decode("utf-8", "surrogateescape")
