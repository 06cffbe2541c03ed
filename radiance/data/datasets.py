"""Sources: random-access sequences of captioned pictures."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from radiance import config


class DataError(ValueError):
    """Data that cannot be used; the message says what is wrong and what to do."""


class Example(NamedTuple):
    picture: Image.Image
    captions: tuple[str, ...]  # of which one is drawn each time
    attributes: dict[str, Any]  # what is known to be in the picture


class Source(Protocol):
    skipped: Mapping[str, int]  # pictures that could not be used, by kind

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Raises Broken for a picture that cannot be decoded."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions alone, for who needs no pixels."""

    def tags(self, index: int) -> bool:
        """Whether they are lists of tags with commas between."""

    def fingerprint(self) -> str:
        """A hash of the contents."""


def open_source(data: config.Data, split: str) -> Source:
    """The source that the config names, prepared on first use. Raises DataError when it is empty, and ConfigError when there is no such folder.

    split: train or validation.
    """
    source = {"digits": _digits, "folder": _folder}[data.source](data, split)
    if len(source) == 0:
        raise DataError(f"The {split} split of {data.source} in {data.directory} is empty: there is nothing to learn from.")
    return source


def describe(source: Source, data: config.Data, split: str) -> dict[str, Any]:
    """What a run directory records of its data."""
    return {"source": data.source, "split": split, "count": len(source), "hash": source.fingerprint(), "skipped": dict(source.skipped)}


def _digits(data: config.Data, split: str) -> Source:
    import tensorflow_datasets as tfds

    from radiance.data.digits import Digits

    def opened() -> tfds.core.DatasetBuilder:
        return Digits(data_dir=str(Path(data.directory).expanduser()), file_format="array_record")

    builder = opened()
    logging.getLogger("absl").setLevel(logging.ERROR)  # it recommends OpenCV at every start
    tfds.disable_progress_bar()  # its bars are for downloads; these take a second
    try:
        builder.download_and_prepare()
    except OSError:
        builder = opened()
        if not builder.is_prepared():  # by another process, at the same time
            raise
    return TfdsSource(builder, split, picture="image", captions="captions", attributes=("digit",))


def _folder(data: config.Data, split: str) -> Source:
    from radiance.data.folder import Folder

    if not data.path:
        raise config.ConfigError("data.source=folder needs data.path=FOLDER: a folder of pictures with captions.")
    return Folder(data, split)


class TfdsSource:
    """A split of a prepared TensorFlow Dataset, read without TensorFlow."""

    def __init__(self, builder: Any, split: str, picture: str, captions: str, attributes: tuple[str, ...]):
        from tensorflow_datasets import decode

        self.builder, self.split = builder, split
        self.keys = (picture, captions, attributes)
        self.data = builder.as_data_source(split=split)
        self.texts = builder.as_data_source(split=split, decoders={picture: decode.SkipDecoding()})
        self.skipped: Mapping[str, int] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        picture, captions, attributes = self.keys
        row = self.data[index]
        return Example(Image.fromarray(row[picture]), tuple(c.decode() for c in row[captions]), {name: row[name] for name in attributes})

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(c.decode() for c in self.texts[index][self.keys[1]])

    def tags(self, index: int) -> bool:
        return False

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(str(p) for p in self.builder.info.splits[self.split].filepaths):
            digest.update(Path(path).read_bytes())
        return digest.hexdigest()
