"""`tfds`: any TensorFlow Dataset, read without TensorFlow, and prepared without it where its code allows that.

`data.picture` and `data.caption` name features; one within others is written as "captions/text", and lists on the way are gone
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

from radiance.config import ConfigError
from radiance.data import records
from radiance.data.catalogue import TRAIN, DataError, Row, Unfit, head_of, in_threads
from radiance.data.decode import Broken
from radiance.sections import meant

FORMAT = "array_record"  # the one of TensorFlow Datasets' formats in which an example is found by its number
NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[^/:]+))?(:(?P<version>[\d.*]+))?")


class Tfds:
    """A prepared data set: of its splits, `train` and, where there is one, `validation`. Pictures are called SPLIT/NUMBER.

    folder: where that version of it lies. Raises ConfigError when it has no such features or splits, and DataError when it has one that
    needs TensorFlow.
    """

    def __init__(self, folder: Path, picture: str, caption: str):
        self.folder, self.picture, self.caption = folder, picture, caption
        info = self._builder.info
        self.splits = [split for split in ("train", "validation") if split in info.splits]
        if not self.splits:
            raise ConfigError(f"{info.full_name} has no split named train: it has {', '.join(info.splits)}.")
        _, listed = self._feature("picture", picture, tfds.features.Image, "pictures")
        if listed:
            raise ConfigError(f"data.picture={picture} of {info.full_name} lies in a list: one picture an example is needed.")
        self._feature("caption", caption, tfds.features.Tensor, "texts or class labels")
        shards = [[Path(path).name, Path(path).stat().st_size] for split in self.splits for path in info.splits[split].filepaths]
        told = [str(folder), info.full_name, picture, caption, sorted(shards)]
        self.identity = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("folder", "picture", "caption", "splits")}

    def rows(self, threads: int) -> Iterator[Row | Unfit]:
        for split in self.splits:
            yield from in_threads(partial(self._row, split), range(len(self._sources[split])), threads)

    def read(self, place: list) -> bytes:
        try:
            return _inside(self._example(*place, self._shown), self.picture)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.folder} was there at the start and cannot be read now ({error}): put it back.") from None

    @cached_property
    def _builder(self) -> Any:
        try:
            return tfds.builder_from_directory(self.folder, file_format=FORMAT)
        except ImportError as error:
            raise DataError(f"{self.folder} has films, sounds or other features that are not read without TensorFlow ({error}).") from None

    @cached_property
    def _sources(self) -> dict[str, Any]:
        """The examples of each split, as they are stored."""
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        return {split: self._builder.as_data_source(split=split, deserialize_method=raw, file_format=FORMAT) for split in self.splits}

    @cached_property
    def _shown(self) -> Any:
        """The features of which the picture is one, or part of one."""
        return self._top([self.picture])

    @cached_property
    def _listed(self) -> Any:
        """The features that say something of the picture, and itself."""
        return self._top([self.picture, self.caption, *self._attributes])

    def _top(self, paths: list[str]) -> Any:
        features = self._builder.info.features
        return tfds.features.FeaturesDict({top: features[top] for top in sorted({path.partition("/")[0] for path in paths})})

    def _example(self, split: str, number: int, features: Any) -> dict[str, Any]:
        """These features of an example; its picture as a file."""
        skip = reduce(lambda inner, key: {key: inner}, reversed(self.picture.split("/")), tfds.decode.SkipDecoding())
        return features.deserialize_example_np(self._sources[split][number], decoders=skip)

    def _row(self, split: str, number: int) -> Row | Unfit:
        name = f"{split}/{number}"
        example = self._example(split, number, self._listed)
        try:
            width, height, content = head_of(BytesIO(_inside(example, self.picture)))
            told = [text for text in self._captions(_inside(example, self.caption)) if text.strip()]
            if not told:
                raise Broken("no caption")
            captions = records.captions_of(told)
        except Broken as broken:
            return Unfit(name, broken.kind)
        lot = None if len(self.splits) == 1 else 0 if split == "validation" else TRAIN
        attributes = {name: _plain(example[name]) for name in self._attributes}
        return Row(name, [split, number], captions, width, height, content=content, attributes=attributes, lot=lot)

    def _captions(self, value: Any) -> list[str]:
        feature, _ = self._feature("caption", self.caption, tfds.features.Tensor, "texts or class labels")
        if isinstance(feature, tfds.features.ClassLabel):
            return [feature.int2str(int(label)) for label in _flat(value) if label >= 0]  # -1: none
        return [_plain(text) for text in _flat(value)]

    @cached_property
    def _attributes(self) -> list[str]:
        """Names of the features that hold a number or a text, beside the picture and the caption."""
        ours = [path.partition("/")[0] for path in (self.picture, self.caption)]
        features = self._builder.info.features
        return [
            name
            for name in features
            if name not in ours and isinstance(features[name], tfds.features.Tensor) and _is_scalar(features[name])
        ]

    def _feature(self, setting: str, path: str, kind: type, wanted: str) -> tuple[Any, bool]:
        """What a path leads to, and whether through a list. Raises ConfigError when it is nothing of that kind."""
        node, listed, title = self._builder.info.features, False, self._builder.info.full_name
        for key in (*path.split("/"), None):
            while isinstance(node, tfds.features.Sequence):
                node, listed = node.feature, True
            if key is not None:
                known = list(node) if isinstance(node, tfds.features.FeaturesDict) else []
                if key not in known:
                    told = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in self._builder.info.features.items())
                    raise ConfigError(f"{title} has no feature data.{setting}={path}{meant(key, known) or '.'} It has {told}.")
                node = node[key]
        if not isinstance(node, kind) or (setting == "caption" and not _is_caption(node)):
            raise ConfigError(f"data.{setting}={path} of {title} is a feature of kind {type(node).__name__}, but {wanted} are needed.")
        return node, listed


def _is_caption(feature: Any) -> bool:
    return feature.shape == () and (isinstance(feature, tfds.features.ClassLabel) or _holds_text(feature))


def _is_scalar(feature: Any) -> bool:
    return feature.shape == () and (_holds_text(feature) or np.dtype(feature.np_dtype).kind in "biuf")


def _holds_text(feature: Any) -> bool:
    return np.dtype(feature.np_dtype).kind in "OSU"


def _plain(value: Any) -> Any:
    """A number or a text, ready for JSON."""
    return value.decode(errors="replace") if isinstance(value, bytes) else np.asarray(value).item()


def _flat(value: Any) -> Iterator[Any]:
    """All that is in lists within lists."""
    if isinstance(value, (list, tuple)) or np.ndim(value):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _inside(node: Any, path: str) -> Any:
    for key in path.split("/"):
        node = node[key] if isinstance(node, dict) else [item[key] for item in node]
    return node


# --- preparation --------------------------------------------------------------------------------------------------------


def prepared(kind: type, directory: Path) -> Path:
    """The folder of a data set of that class, prepared under `directory` on first use."""
    builder = kind(data_dir=str(directory), file_format=FORMAT)
    _prepare(builder)
    return Path(builder.data_dir)


def named(path: str, directory: Path) -> Path:
    """The folder of the data set that is called NAME[/CONFIG][:VERSION]: one that was prepared in $TFDS_DATA_DIR, in
    ~/tensorflow_datasets or under `directory`, or else it is prepared now, in the first of them if that is set and in the last
    if not. Without a version, the newest.

    Raises ConfigError when there is no such data set, and DataError when it cannot be prepared or read here.
    """
    asked = NAME.fullmatch(path)
    if not asked:
        raise ConfigError(f"data.path={path} is no name of a TensorFlow Dataset: write NAME, NAME/CONFIG or NAME/CONFIG:1.2.3.")
    ours = os.environ.get("TFDS_DATA_DIR")
    roots = [Path(root).expanduser() for root in (ours or "~/tensorflow_datasets", directory)]
    found = [folder for root in roots for folder in _versions(root, **asked.groupdict())]
    for folder in found:
        if list(folder.glob(f"*.{FORMAT}-*")):
            return folder
    if found:
        raise DataError(
            f"{path} lies in {found[0]} in a format that only TensorFlow reads. Where that is installed, "
            f"`tfds convert_format --dataset_version_dir={found[0]} --out_file_format={FORMAT}` writes it once more, as it is read here."
        )
    root = Path(ours).expanduser() if ours else directory
    elsewhere = f"prepare it where TensorFlow and a network are, with `tfds build {path} --file_format={FORMAT}`, and set TFDS_DATA_DIR to where it lies."
    try:
        builder = tfds.builder(path, data_dir=str(root), file_format=FORMAT)
    except tfds.core.DatasetNotFoundError:
        near = meant(asked["name"], tfds.list_builders(with_community_datasets=False))
        raise ConfigError(
            f"data.path={path} is no TensorFlow Dataset that is known here{near or '.'} Prepared ones are looked for in {', '.join(map(str, roots))}."
        ) from None
    except ImportError as error:
        raise DataError(f"{path} cannot be prepared here ({_first(error)}): {elsewhere}") from None
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"data.path={path}: {_first(error)}") from None
    try:
        _prepare(builder)
    except Exception as error:  # of its own code, of downloads, of what must be put there by hand
        raise DataError(f"{path} is not in {root} and cannot be prepared there ({_first(error)}): {elsewhere}") from error
    return Path(builder.data_dir)


def _prepare(builder: Any):
    logging.getLogger("absl").setLevel(logging.ERROR)  # it recommends OpenCV at every start
    tfds.disable_progress_bar()  # its bars are for downloads
    try:
        builder.download_and_prepare()
    except OSError:
        if not list(Path(builder.data_dir).glob("dataset_info.json")):  # by another process, at the same time
            raise


def _versions(root: Path, name: str, config: str | None, version: str | None) -> list[Path]:
    """The folders under `root` in which such a data set was prepared, the newest first."""
    folder = root / name
    if config is None:
        default = folder / ".config" / "metadata.json"
        config = json.loads(default.read_text()).get("defaultConfigName", "") if default.is_file() else ""
    found = [path.parent for path in (folder / config).glob("*/dataset_info.json") if tfds.core.Version.is_valid(path.parent.name)]
    number = {path: tfds.core.Version(path.name) for path in found}
    return sorted((path for path in found if version is None or number[path].match(version)), key=number.get, reverse=True)


def _first(error: Exception) -> str:
    """The first line of what it says."""
    told = re.sub(r"^Failed to construct dataset .*?}\": ", "", str(error).strip()) or type(error).__name__
    return told.splitlines()[0].rstrip(".:")
