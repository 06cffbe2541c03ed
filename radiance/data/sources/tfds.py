"""The data source `tfds`: any TensorFlow Dataset, read without TensorFlow.

`data.image_key` and `data.caption_key` name features. A feature within another is written as
"captions/text", also through lists. A caption is a text, several, or class labels, whose names are
the captions. Other features of numbers or texts become attributes of the image.

Datasets are found or prepared by radiance/data/sources/tfds_preparation.py.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property, partial, reduce
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError

from radiance.base.errors import DataError, TextError
from radiance.base.settings import suggest_name
from radiance.base.text_files import decode_text
from radiance.config import ConfigError
from radiance.data.listing import (
    TRAIN_HASH,
    IndexRecord,
    UnusableRecord,
    map_in_threads,
    read_image_header,
)
from radiance.data.sources.records import Annotation, make_record
from radiance.data.sources.tfds_preparation import FILE_FORMAT
from radiance.data.unusable import UnusableError

TEXTS = "texts or class labels"
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, DecodeError)


class TfdsListing:
    """A prepared dataset: its split `train` and, if there is one, `validation`.

    Images are named SPLIT/INDEX.

    Args:
        folder: Folder of one version of the dataset.
        image_key: Feature that is the image, possibly within others ("a/b").
        caption_key: Feature that holds the captions, possibly within others.

    Raises:
        ConfigError: The dataset has no such features or splits.
        DataError: The dataset has a feature that needs TensorFlow.
    """

    def __init__(self, folder: Path, image_key: str, caption_key: str):
        self.folder, self.image_key, self.caption_key = folder, image_key, caption_key
        info = self._builder.info
        self.splits = [split for split in ("train", "validation") if split in info.splits]
        if not self.splits:
            available = ", ".join(info.splits)
            raise ConfigError(
                f"{info.full_name} has no split named train, only {available}: "
                "choose another dataset."
            )
        _, is_list = self._require_feature("image_key", tfds.features.Image, "images")
        if is_list:
            raise ConfigError(
                f"data.image_key={image_key} of {info.full_name} is in a list: "
                "name a feature with one image an example."
            )
        self._require_feature("caption_key", tfds.features.Tensor, TEXTS)
        shards = [
            [Path(path).name, Path(path).stat().st_size, Path(path).stat().st_mtime_ns]
            for split in self.splits
            for path in info.splits[split].filepaths
        ]
        identity_fields = [str(folder), info.full_name, image_key, caption_key, sorted(shards)]
        self.identity = hashlib.sha256(json.dumps(identity_fields).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        names = ("folder", "image_key", "caption_key", "splits")
        return {name: getattr(self, name) for name in names}

    def scan(self, num_threads: int) -> Iterator[IndexRecord | UnusableRecord]:
        """Yield a record for each example.

        Raises:
            DataError: The dataset is damaged.
        """
        for split in self.splits:
            indices = range(len(self._split_examples[split]))
            yield from map_in_threads(partial(self._make_record, split), indices, num_threads)

    def address(self, location: list) -> None:
        """Return None: an image is a part of an example."""
        return None

    def read_file(self, location: list) -> bytes:
        """Read an image's file.

        Raises:
            DataError: The dataset cannot be read any more.
        """
        split, index = location
        try:
            example = self._read_example(split, index, self._image_features)
        except READ_ERRORS as error:
            raise DataError(
                f"{self.folder} existed at the start and cannot be read now ({error}): put it back."
            ) from None
        return _value_at_path(example, self.image_key)

    @cached_property
    def _builder(self) -> Any:
        try:
            return tfds.builder_from_directory(self.folder, file_format=FILE_FORMAT)
        except ImportError as error:
            raise DataError(
                f"{self.folder} has videos, audio or other features that cannot be read without "
                f"TensorFlow ({error}): choose another dataset."
            ) from None

    @cached_property
    def _split_examples(self) -> dict[str, Any]:
        """The serialized examples of each split."""
        raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
        return {
            split: self._builder.as_data_source(
                split=split, deserialize_method=raw_bytes, file_format=FILE_FORMAT
            )
            for split in self.splits
        }

    @cached_property
    def _image_features(self) -> Any:
        """The feature that is the image or contains it."""
        return self._select_features([self.image_key])

    @cached_property
    def _index_features(self) -> Any:
        """The features that enter the dataset index."""
        return self._select_features([self.image_key, self.caption_key, *self._attribute_names])

    def _select_features(self, paths: list[str]) -> Any:
        features = self._builder.info.features
        names = sorted({path.partition("/")[0] for path in paths})
        return tfds.features.FeaturesDict({name: features[name] for name in names})

    def _read_example(self, split: str, index: int, features: Any) -> dict[str, Any]:
        """Read some features of an example, with the image as an encoded file."""
        decoders = reduce(
            lambda inner, key: {key: inner},
            reversed(self.image_key.split("/")),
            tfds.decode.SkipDecoding(),
        )
        serialized = self._split_examples[split][index]
        return features.deserialize_example_np(serialized, decoders=decoders)

    def _make_record(self, split: str, index: int) -> IndexRecord | UnusableRecord:
        try:
            example = self._read_example(split, index, self._index_features)
        except READ_ERRORS as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise DataError(
                f"Example {index} of the split {split} in {self.folder} cannot be read ({reason}): "
                "prepare it again."
            ) from None
        split_hash = None  # the names of images decide where there is only one split
        if len(self.splits) > 1:
            split_hash = 0 if split == "validation" else TRAIN_HASH
        try:
            attributes = {name: _to_python(example[name]) for name in self._attribute_names}
        except UnusableError as error:
            return UnusableRecord(f"{split}/{index}", error.kind)
        return make_record(
            f"{split}/{index}",
            [split, index],
            partial(self._read_annotation, example),
            lambda: read_image_header(BytesIO(_value_at_path(example, self.image_key))),
            attributes,
            split_hash,
        )

    def _read_annotation(self, example: dict[str, Any]) -> Annotation:
        values = _flatten(_value_at_path(example, self.caption_key))
        feature, _ = self._require_feature("caption_key", tfds.features.Tensor, TEXTS)
        if isinstance(feature, tfds.features.ClassLabel):
            captions = [feature.int2str(int(label)) for label in values if label >= 0]  # −1: none
        else:
            captions = [_to_python(text) for text in values]
        if not any(text.strip() for text in captions):
            raise UnusableError("no caption")
        return Annotation(tuple(captions))

    @cached_property
    def _attribute_names(self) -> list[str]:
        """Names of the features of numbers or texts, beside the image and the caption."""
        used_features = [path.partition("/")[0] for path in (self.image_key, self.caption_key)]
        return [
            name
            for name, feature in self._builder.info.features.items()
            if name not in used_features
            and isinstance(feature, tfds.features.Tensor)
            and _is_scalar(feature)
        ]

    def _require_feature(self, setting: str, feature_type: type, expected: str) -> tuple[Any, bool]:
        """Find the feature that `image_key` or `caption_key` names, and whether it is in a list."""
        path, info = getattr(self, setting), self._builder.info
        feature, is_list = _remove_lists(info.features)
        for key in path.split("/"):
            names = list(feature) if isinstance(feature, tfds.features.FeaturesDict) else []
            if key not in names:
                available = ", ".join(
                    f"{name} ({type(feature).__name__})" for name, feature in info.features.items()
                )
                raise ConfigError(
                    f"{info.full_name} has no feature data.{setting}={path}"
                    f"{suggest_name(key, names) or '.'} It has {available}."
                )
            feature, is_sequence = _remove_lists(feature[key])
            is_list |= is_sequence
        is_expected = isinstance(feature, feature_type) and (
            setting == "image_key" or _is_caption(feature)
        )
        if not is_expected:
            raise ConfigError(
                f"data.{setting}={path} of {info.full_name} is a feature of type "
                f"{type(feature).__name__}: name a feature with {expected}."
            )
        return feature, is_list


def _remove_lists(feature: Any) -> tuple[Any, bool]:
    """Return the feature within lists, and whether there are any."""
    is_list = False
    while isinstance(feature, tfds.features.Sequence):
        feature, is_list = feature.feature, True
    return feature, is_list


def _is_caption(feature: Any) -> bool:
    is_label = isinstance(feature, tfds.features.ClassLabel)
    return feature.shape == () and (is_label or _has_text(feature))


def _is_scalar(feature: Any) -> bool:
    is_number = np.dtype(feature.np_dtype).kind in "biuf"
    return feature.shape == () and (is_number or _has_text(feature))


def _has_text(feature: Any) -> bool:
    return np.dtype(feature.np_dtype).kind in "OSU"


def _to_python(value: Any) -> Any:
    """Convert a number or a text to what JSON can hold.

    Raises:
        UnusableError: The text is not in UTF-8.
    """
    if not isinstance(value, bytes):
        return np.asarray(value).item()
    try:
        return decode_text(value, "feature")
    except TextError:
        raise UnusableError("text not in UTF-8") from None


def _flatten(value: Any) -> Iterator[Any]:
    """Yield all items of nested lists."""
    if isinstance(value, (list, tuple)) or np.ndim(value):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


def _value_at_path(node: Any, path: str) -> Any:
    for key in path.split("/"):
        node = node[key] if isinstance(node, dict) else [item[key] for item in node]
    return node
