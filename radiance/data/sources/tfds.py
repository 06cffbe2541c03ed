"""`tfds`: any TensorFlow Dataset, read without TensorFlow, and prepared without it where its code allows that.

`data.image_key` and `data.caption_key` name features; one within others is written as "captions/text", and lists on the way are gone
through. A caption is a text, several, or class labels, whose names they then are. What else is a number or a text is an attribute.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import cached_property, partial, reduce
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from radiance.base.errors import DataError
from radiance.base.settings import suggest_name
from radiance.config import ConfigError
from radiance.data.decode import UnusableError
from radiance.data.listing import (
    TRAIN_HASH,
    IndexRecord,
    Unusable,
    map_in_threads,
    read_image_header,
)
from radiance.data.sources import records

FILE_FORMAT = "array_record"  # the one of TensorFlow Datasets' formats in which an example is found by its number
NAME_PATTERN = re.compile(r"(?P<name>\w+)(/(?P<config>[^/:]+))?(:(?P<version>[\d.*]+))?")


class TfdsListing:
    """A prepared data set: of its splits, `train` and, where there is one, `validation`. Images are called SPLIT/NUMBER.

    folder: where that version of it lies. Raises ConfigError when it has no such features or splits, and DataError when it has one that
    needs TensorFlow.
    """

    def __init__(self, folder: Path, image_key: str, caption_key: str):
        self.folder, self.image_key, self.caption_key = folder, image_key, caption_key
        info = self._builder.info
        self.splits = [split for split in ("train", "validation") if split in info.splits]
        if not self.splits:
            raise ConfigError(
                f"{info.full_name} has no split named train: it has {', '.join(info.splits)}."
            )
        _, is_list = self._find_feature("image", image_key, tfds.features.Image, "images")
        if is_list:
            raise ConfigError(
                f"data.image_key={image_key} of {info.full_name} lies in a list: one image an example is needed."
            )
        self._find_feature("caption", caption_key, tfds.features.Tensor, "texts or class labels")
        shards = [
            [Path(path).name, Path(path).stat().st_size]
            for split in self.splits
            for path in info.splits[split].filepaths
        ]
        identity_fields = [str(folder), info.full_name, image_key, caption_key, sorted(shards)]
        self.identity = hashlib.sha256(json.dumps(identity_fields).encode()).hexdigest()

    def __getstate__(self):
        return {
            name: getattr(self, name) for name in ("folder", "image_key", "caption_key", "splits")
        }

    def scan(self, num_threads: int) -> Iterator[IndexRecord | Unusable]:
        for split in self.splits:
            yield from map_in_threads(
                partial(self._make_record, split),
                range(len(self._split_examples[split])),
                num_threads,
            )

    def address(self, location: list) -> None:
        """Return None: an image is a part of an example."""
        return None

    def read_file(self, location: list) -> bytes:
        try:
            return _value_at_path(
                self._read_example(*location, self._image_features), self.image_key
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.folder} was there at the start and cannot be read now ({error}): put it back."
            ) from None

    @cached_property
    def _builder(self) -> Any:
        try:
            return tfds.builder_from_directory(self.folder, file_format=FILE_FORMAT)
        except ImportError as error:
            raise DataError(
                f"{self.folder} has films, sounds or other features that are not read without TensorFlow ({error})."
            ) from None

    @cached_property
    def _split_examples(self) -> dict[str, Any]:
        """The examples of each split, as they are stored."""
        raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
        return {
            split: self._builder.as_data_source(
                split=split, deserialize_method=raw_bytes, file_format=FILE_FORMAT
            )
            for split in self.splits
        }

    @cached_property
    def _image_features(self) -> Any:
        """The features of which the image is one, or part of one."""
        return self._select_features([self.image_key])

    @cached_property
    def _index_features(self) -> Any:
        """The features that say something of the image, and itself."""
        return self._select_features([self.image_key, self.caption_key, *self._attribute_names])

    def _select_features(self, paths: list[str]) -> Any:
        features = self._builder.info.features
        return tfds.features.FeaturesDict(
            {name: features[name] for name in sorted({path.partition("/")[0] for path in paths})}
        )

    def _read_example(self, split: str, index: int, features: Any) -> dict[str, Any]:
        """These features of an example; its image as a file."""
        decoders = reduce(
            lambda inner, key: {key: inner},
            reversed(self.image_key.split("/")),
            tfds.decode.SkipDecoding(),
        )
        return features.deserialize_example_np(
            self._split_examples[split][index], decoders=decoders
        )

    def _make_record(self, split: str, index: int) -> IndexRecord | Unusable:
        name = f"{split}/{index}"
        example = self._read_example(split, index, self._index_features)
        try:
            width, height, content_hash = read_image_header(
                BytesIO(_value_at_path(example, self.image_key))
            )
            texts = [
                text
                for text in self._parse_captions(_value_at_path(example, self.caption_key))
                if text.strip()
            ]
            if not texts:
                raise UnusableError("no caption")
            captions = records.clean_captions(texts)
        except UnusableError as error:
            return Unusable(name, error.kind)
        split_hash = None if len(self.splits) == 1 else 0 if split == "validation" else TRAIN_HASH
        attributes = {name: _to_python(example[name]) for name in self._attribute_names}
        return IndexRecord(
            name,
            [split, index],
            captions,
            width,
            height,
            content_hash=content_hash,
            attributes=attributes,
            split_hash=split_hash,
        )

    def _parse_captions(self, value: Any) -> list[str]:
        feature, _ = self._find_feature(
            "caption", self.caption_key, tfds.features.Tensor, "texts or class labels"
        )
        if isinstance(feature, tfds.features.ClassLabel):
            return [
                feature.int2str(int(label)) for label in _flatten(value) if label >= 0
            ]  # -1: none
        return [_to_python(text) for text in _flatten(value)]

    @cached_property
    def _attribute_names(self) -> list[str]:
        """Names of the features that hold a number or a text, beside the image and the caption."""
        used_features = [path.partition("/")[0] for path in (self.image_key, self.caption_key)]
        features = self._builder.info.features
        return [
            name
            for name in features
            if name not in used_features
            and isinstance(features[name], tfds.features.Tensor)
            and _is_scalar(features[name])
        ]

    def _find_feature(
        self, setting: str, path: str, feature_type: type, expected: str
    ) -> tuple[Any, bool]:
        """What a path leads to, and whether through a list. Raises ConfigError when it is nothing of that kind."""
        node, is_list, dataset_name = (
            self._builder.info.features,
            False,
            self._builder.info.full_name,
        )
        for key in (*path.split("/"), None):
            while isinstance(node, tfds.features.Sequence):
                node, is_list = node.feature, True
            if key is not None:
                names = list(node) if isinstance(node, tfds.features.FeaturesDict) else []
                if key not in names:
                    available = ", ".join(
                        f"{name} ({type(feature).__name__})"
                        for name, feature in self._builder.info.features.items()
                    )
                    raise ConfigError(
                        f"{dataset_name} has no feature data.{setting}={path}{suggest_name(key, names) or '.'} It has {available}."
                    )
                node = node[key]
        if not isinstance(node, feature_type) or (setting == "caption" and not _is_caption(node)):
            raise ConfigError(
                f"data.{setting}={path} of {dataset_name} is a feature of kind {type(node).__name__}, but {expected} are needed."
            )
        return node, is_list


def _is_caption(feature: Any) -> bool:
    return feature.shape == () and (
        isinstance(feature, tfds.features.ClassLabel) or _holds_text(feature)
    )


def _is_scalar(feature: Any) -> bool:
    return feature.shape == () and (
        _holds_text(feature) or np.dtype(feature.np_dtype).kind in "biuf"
    )


def _holds_text(feature: Any) -> bool:
    return np.dtype(feature.np_dtype).kind in "OSU"


def _to_python(value: Any) -> Any:
    """A number or a text, ready for JSON."""
    return value.decode(errors="replace") if isinstance(value, bytes) else np.asarray(value).item()


def _flatten(value: Any) -> Iterator[Any]:
    """All that is in lists within lists."""
    if isinstance(value, (list, tuple)) or np.ndim(value):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


def _value_at_path(node: Any, path: str) -> Any:
    for key in path.split("/"):
        node = node[key] if isinstance(node, dict) else [item[key] for item in node]
    return node


# --- preparation --------------------------------------------------------------------------------------------------------


def prepare_dataset(builder_class: type, cache_dir: Path) -> Path:
    """The folder of a data set of that class, prepared under `directory` on first use."""
    builder = builder_class(data_dir=str(cache_dir), file_format=FILE_FORMAT)
    _run_builder(builder)
    return Path(builder.data_dir)


def find_or_prepare_dataset(path: str, cache_dir: Path) -> Path:
    """The folder of the data set that is called NAME[/CONFIG][:VERSION]: one that was prepared in $TFDS_DATA_DIR, in
    ~/tensorflow_datasets or under `directory`, or else it is prepared now, in the first of them if that is set and in the last
    if not. Without a version, the newest.

    Raises ConfigError when there is no such data set, and DataError when it cannot be prepared or read here.
    """
    match = NAME_PATTERN.fullmatch(path)
    if not match:
        raise ConfigError(
            f"data.path={path} is no name of a TensorFlow Dataset: write NAME, NAME/CONFIG or NAME/CONFIG:1.2.3."
        )
    env_dir = os.environ.get("TFDS_DATA_DIR")
    roots = [Path(root).expanduser() for root in (env_dir or "~/tensorflow_datasets", cache_dir)]
    version_folders = [
        folder for root in roots for folder in _find_versions(root, **match.groupdict())
    ]
    for folder in version_folders:
        if list(folder.glob(f"*.{FILE_FORMAT}-*")):
            return folder
    if version_folders:
        raise DataError(
            f"{path} lies in {version_folders[0]} in a format that only TensorFlow reads. Where that is installed, "
            f"`tfds convert_format --dataset_version_dir={version_folders[0]} --out_file_format={FILE_FORMAT}` writes it once more, as it is read here."
        )
    root = Path(env_dir).expanduser() if env_dir else cache_dir
    remedy = f"prepare it where TensorFlow and a network are, with `tfds build {path} --file_format={FILE_FORMAT}`, and set TFDS_DATA_DIR to where it lies."
    try:
        builder = tfds.builder(path, data_dir=str(root), file_format=FILE_FORMAT)
    except tfds.core.DatasetNotFoundError:
        suggestion = suggest_name(match["name"], tfds.list_builders(with_community_datasets=False))
        raise ConfigError(
            f"data.path={path} is no TensorFlow Dataset that is known here{suggestion or '.'} Prepared ones are looked for in {', '.join(map(str, roots))}."
        ) from None
    except ImportError as error:
        raise DataError(
            f"{path} cannot be prepared here ({_first_line(error)}): {remedy}"
        ) from None
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"data.path={path}: {_first_line(error)}") from None
    try:
        _run_builder(builder)
    except Exception as error:  # of its own code, of downloads, of what must be put there by hand
        raise DataError(
            f"{path} is not in {root} and cannot be prepared there ({_first_line(error)}): {remedy}"
        ) from error
    return Path(builder.data_dir)


def _run_builder(builder: Any):
    logging.getLogger("absl").setLevel(logging.ERROR)  # it recommends OpenCV at every start
    tfds.disable_progress_bar()  # its bars are for downloads
    try:
        builder.download_and_prepare()
    except OSError:
        if not list(
            Path(builder.data_dir).glob("dataset_info.json")
        ):  # by another process, at the same time
            raise


def _find_versions(root: Path, name: str, config: str | None, version: str | None) -> list[Path]:
    """The folders under `root` in which such a data set was prepared, the newest first."""
    folder = root / name
    if config is None:
        default_file = folder / ".config" / "metadata.json"
        config = (
            json.loads(default_file.read_text()).get("defaultConfigName", "")
            if default_file.is_file()
            else ""
        )
    folders = [
        path.parent
        for path in (folder / config).glob("*/dataset_info.json")
        if tfds.core.Version.is_valid(path.parent.name)
    ]
    versions = {path: tfds.core.Version(path.name) for path in folders}
    return sorted(
        (path for path in folders if version is None or versions[path].match(version)),
        key=versions.get,
        reverse=True,
    )


def _first_line(error: Exception) -> str:
    """The first line of what it says."""
    message = (
        re.sub(r"^Failed to construct dataset .*?}\": ", "", str(error).strip())
        or type(error).__name__
    )
    return message.splitlines()[0].rstrip(".:")
