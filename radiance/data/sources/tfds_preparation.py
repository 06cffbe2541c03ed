"""Find TensorFlow Datasets that are prepared, and prepare others where their code allows it."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from radiance.base.errors import DataError
from radiance.base.settings import suggest_name
from radiance.base.text_files import read_text
from radiance.config import ConfigError

# Of the formats of TensorFlow Datasets, the one in which an example is found by its index.
FILE_FORMAT = "array_record"
NAME_PATTERN = re.compile(r"(?P<name>\w+)(/(?P<config>[^/:]+))?(:(?P<version>[\d.*]+))?")


def prepare_dataset(builder_class: type, cache_dir: Path) -> Path:
    """Prepare the dataset of a builder below `cache_dir` on first use, and return its folder."""
    builder = builder_class(data_dir=str(cache_dir), file_format=FILE_FORMAT)
    _run_builder(builder)
    return Path(builder.data_dir)


def find_or_prepare_dataset(path: str, cache_dir: Path) -> Path:
    """Find a prepared dataset, or prepare it, and return its folder.

    Datasets are searched in $TFDS_DATA_DIR (by default ~/tensorflow_datasets), then below
    `cache_dir`. They are prepared in $TFDS_DATA_DIR if that is set, otherwise below `cache_dir`.

    Args:
        path: NAME, NAME/CONFIG or NAME/CONFIG:VERSION. By default the newest version.
        cache_dir: Folder of prepared datasets.

    Raises:
        ConfigError: There is no such dataset.
        DataError: It cannot be prepared, or not be read without TensorFlow.
    """
    match = NAME_PATTERN.fullmatch(path)
    if not match:
        raise ConfigError(
            f"data.path={path} is not the name of a TensorFlow Dataset: "
            "use NAME, NAME/CONFIG or NAME/CONFIG:1.2.3."
        )
    env_dir = os.environ.get("TFDS_DATA_DIR")
    roots = [Path(root).expanduser() for root in (env_dir or "~/tensorflow_datasets", cache_dir)]
    folder = _find_prepared(path, roots, match)
    if folder is not None:
        return folder
    return _prepare(path, match["name"], roots, roots[0] if env_dir else cache_dir)


def _find_prepared(path: str, roots: list[Path], match: re.Match[str]) -> Path | None:
    """Find the newest version in a format that can be read."""
    folders = [folder for root in roots for folder in _find_versions(root, **match.groupdict())]
    for folder in folders:
        if list(folder.glob(f"*.{FILE_FORMAT}-*")):
            return folder
    if folders:
        raise DataError(
            f"{path} is in {folders[0]} in a format that only TensorFlow reads. Where it is "
            f"installed, convert it with `tfds convert_format --dataset_version_dir={folders[0]} "
            f"--out_file_format={FILE_FORMAT}`."
        )
    return None


def _prepare(path: str, name: str, roots: list[Path], root: Path) -> Path:
    """Prepare a dataset below `root`, and return its folder."""
    remedy = (
        "prepare it on a machine with TensorFlow and a network, with "
        f"`tfds build {path} --file_format={FILE_FORMAT}`, and set TFDS_DATA_DIR to its folder."
    )
    try:
        builder = tfds.builder(path, data_dir=str(root), file_format=FILE_FORMAT)
    except tfds.core.DatasetNotFoundError:
        suggestion = suggest_name(name, tfds.list_builders(with_community_datasets=False))
        raise ConfigError(
            f"data.path={path} is not a known TensorFlow Dataset{suggestion or '.'} "
            f"Prepared datasets are searched in {', '.join(map(str, roots))}."
        ) from None
    except ImportError as error:
        raise DataError(
            f"{path} cannot be prepared here ({_first_line(error)}): {remedy}"
        ) from None
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"data.path={path}: {_first_line(error)}") from None
    try:
        _run_builder(builder)
    except Exception as error:  # the builder's own code, downloads, files that a user must provide
        raise DataError(
            f"{path} is not in {root} and cannot be prepared there ({_first_line(error)}): {remedy}"
        ) from error
    return Path(builder.data_dir)


def _run_builder(builder: Any):
    logging.getLogger("absl").setLevel(logging.ERROR)  # it recommends OpenCV at every start
    tfds.disable_progress_bar()  # progress bars are for downloads
    try:
        builder.download_and_prepare()
    except OSError:
        # Another process may have prepared the dataset at the same time.
        if not list(Path(builder.data_dir).glob("dataset_info.json")):
            raise


def _find_versions(root: Path, name: str, config: str | None, version: str | None) -> list[Path]:
    """Find the folders below `root` with prepared versions of a dataset, the newest first."""
    folder = root / name
    if config is None:
        default_file = folder / ".config" / "metadata.json"
        metadata = json.loads(read_text(default_file)) if default_file.is_file() else {}
        config = str(metadata.get("defaultConfigName", ""))
    versions = [
        (tfds.core.Version(info.parent.name), info.parent)
        for info in (folder / config).glob("*/dataset_info.json")
        if tfds.core.Version.is_valid(info.parent.name)
    ]
    matches = [entry for entry in versions if version is None or entry[0].match(version)]
    return [path for _, path in sorted(matches, key=lambda entry: entry[0], reverse=True)]


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    prefix = r"^Failed to construct dataset .*?}\": "
    message = re.sub(prefix, "", str(error).strip()) or type(error).__name__
    return message.splitlines()[0].rstrip(".:")
