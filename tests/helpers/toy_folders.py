"""Folders of captioned images, for tests."""

import json

from PIL import Image

from radiance import config
from radiance.data.datasets import open_source


def save(path, *captions, size=(12, 10), color=(200, 30, 60), **options):
    """Write an image, and its captions next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    if captions:
        path.with_suffix(".txt").write_text("\n".join(captions))


def fill(folder, num_images=40, **options):
    """Write images whose color and caption give their index."""
    for index in range(num_images):
        save(folder / f"{index:02d}.png", f"image {index}", color=(index, index, index), **options)
    return folder


def settings(folder, validation_fraction=0.0, **changes):
    """Return settings of a folder; nearly every image is for training.

    The dataset index is written to a subfolder in which no image is searched.
    """
    defaults = {
        "cache_dir": f"{folder}/.prepared",
        "resolution": 8,
        "max_upscale": 2.0,
        "num_threads": 2,
        "caption_dropout": 0.0,
        "max_broken_fraction": 1.0,
    }
    return config.Data(
        source="folder",
        path=str(folder),
        validation_fraction=validation_fraction,
        **defaults | changes,
    )


def open_folder(folder, split="train", validation_fraction=0.0, **changes):
    """Open one split of a folder."""
    return open_source(settings(folder, validation_fraction, **changes), split)


def names(source):
    """Return the names of all images of a source."""
    return [source.name(i) for i in range(len(source))]


def captions(source):
    """Return the captions of all images of a source, by name."""
    return {source.name(i): source.captions(i) for i in range(len(source))}


def first_pixels(batch):
    """Return the red value of each image's first pixel."""
    return batch["image"][:, 0, 0, 0].astype(int)


def write_metadata(folder, *rows):
    """Write a metadata.jsonl with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
