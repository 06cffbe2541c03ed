"""Folders of captioned images, for tests."""

import json

from PIL import Image

from radiance import config
from radiance.data.datasets import open_source


def save(path, *captions, size=(12, 10), color=(200, 30, 60), **how):
    """An image, with its captions beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **how)
    if captions:
        path.with_suffix(".txt").write_text("\n".join(captions))


def fill(folder, count=40):
    for i in range(count):
        save(folder / f"{i:02d}.png", f"image {i}", color=(i, i, i))
    return folder


def settings(folder, validation=1e-9, side=8, broken_limit=1.0, **more):
    """By default everything is for training. The dataset indexes lie where no image is looked for."""
    more = {
        "directory": f"{folder}/.prepared",
        "enlarge": 2.0,
        "threads": 2,
        "caption_dropout": 0.0,
    } | more
    return config.Data(
        source="folder",
        path=str(folder),
        validation_fraction=validation,
        resolution=side,
        max_broken_fraction=broken_limit,
        **more,
    )


def opened(folder, split="train", *values, **more):
    return open_source(settings(folder, *values, **more), split)


def names(source):
    return [source.name(i) for i in range(len(source))]


def captions(source):
    return {source.name(i): source.captions(i) for i in range(len(source))}


def pixels_of(batch):
    """The red of each image's first pixel."""
    return batch["image"][:, 0, 0, 0].astype(int)


def listing(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
