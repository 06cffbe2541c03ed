"""`tfds`: any TensorFlow Dataset, read without TensorFlow."""

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np

from radiance.data import decode
from radiance.data.catalogue import TRAIN, Row, Unfit


def prepared(kind: type, directory: Path) -> Any:
    """A builder of that class, with its data prepared on first use."""
    import tensorflow_datasets as tfds

    def opened() -> tfds.core.DatasetBuilder:
        return kind(data_dir=str(directory), file_format="array_record")

    builder = opened()
    logging.getLogger("absl").setLevel(logging.ERROR)  # it recommends OpenCV at every start
    tfds.disable_progress_bar()  # its bars are for downloads; these take a second
    try:
        builder.download_and_prepare()
    except OSError:
        builder = opened()
        if not builder.is_prepared():  # by another process, at the same time
            raise
    return builder


class Tfds:
    """A prepared data set: of its splits, `train` and, where there is one, `validation`.

    picture, caption: names of features; a feature within others as "captions/text". A caption may be a text, several, or a class
    label, whose name it then is. What else is a number or a label is an attribute of the picture.
    """

    def __init__(self, builder: Any, picture: str, caption: str):
        self.builder, self.picture, self.caption = builder, picture, caption
        self.splits = [split for split in ("train", "validation") if split in builder.info.splits]
        shards = [[str(path), Path(path).stat().st_size] for split in self.splits for path in builder.info.splits[split].filepaths]
        self.identity = json.dumps([builder.info.full_name, picture, caption, sorted(shards)])

    @cached_property
    def sources(self) -> dict[str, Any]:
        """Each split, its pictures left as files."""
        from tensorflow_datasets import decode as how

        skip = reduce(lambda inner, key: {key: inner}, reversed(self.picture.split("/")), how.SkipDecoding())
        return {split: self.builder.as_data_source(split=split, decoders=skip) for split in self.splits}

    def rows(self, threads: int) -> Iterator[Row | Unfit]:
        for split, source in self.sources.items():
            for number in range(len(source)):
                yield self._row(split, number, source[number])

    def read(self, place: list) -> bytes:
        split, number = place
        return _inside(self.sources[split][number], self.picture)

    def _row(self, split: str, number: int, example: dict[str, Any]) -> Row | Unfit:
        name = f"{split}/{number}"
        content = _inside(example, self.picture)
        try:
            width, height = decode.size_of(io.BytesIO(content))
        except decode.Broken as broken:
            return Unfit(name, broken.kind)
        captions = tuple(text for text in self._captions(example) if text)
        if not captions:
            return Unfit(name, "no caption")
        lot = None if len(self.splits) == 1 else 0 if split == "validation" else TRAIN
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        return Row(name, [split, number], captions, width, height, content=digest, attributes=self._attributes(example), lot=lot)

    def _captions(self, example: dict[str, Any]) -> list[str]:
        feature, value = _inside(self.builder.info.features, self.caption), _inside(example, self.caption)
        if hasattr(feature, "int2str"):
            return [feature.int2str(int(value))]
        return [text.decode(errors="replace").strip() for text in ([value] if isinstance(value, bytes) else value)]

    def _attributes(self, example: dict[str, Any]) -> dict[str, Any]:
        top = self.caption.partition("/")[0]
        return {name: np.asarray(value).item() for name, value in example.items() if name != top and _plain(value)}


def _plain(value: Any) -> bool:
    """A number, for bytes would not go into JSON."""
    return not isinstance(value, bytes) and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf"


def _inside(tree: Any, path: str) -> Any:
    return reduce(lambda node, key: node[key], path.split("/"), tree)
