"""Shards, the few large files that a dataset is divided into: find them and read from them."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import BinaryIO, NamedTuple

from radiance import config
from radiance.base.errors import DataError
from radiance.data import storage
from radiance.data.addresses import is_remote, join_address, resolve_address

BRACE_PATTERN = re.compile(r"\{([^{}]*)\}")  # the innermost braces
WILDCARD_PATTERN = re.compile(r"[*?\[{]")


class ShardFile(NamedTuple):
    """A shard as it is stored."""

    name: str  # below the folder that was given or that the pattern begins with, without suffix
    path: str  # path or URL
    size: int  # bytes
    version: str  # changes with the content


def find_shards(path: str, suffix: str) -> list[ShardFile]:
    """Find the shards that `data.path` names, ordered by name.

    Args:
        path: A file; a folder of files with the suffix, without names that begin with a dot; or a
            pattern of `*`, `?`, `[abc]`, `{a,b}` and `{000..127}`. Every alternative in braces
            must exist. On remote storage a folder's address ends with "/", and only the last part
            of an address can be a pattern.
        suffix: Suffix of shards, such as ".tar".

    Raises:
        ConfigError: There is no such shard.
    """
    list_files = _list_remote if is_remote(path) else _list_local
    location = path if is_remote(path) else os.path.expanduser(path)
    is_file_or_folder = not is_remote(path) and os.path.exists(location)
    patterns = [location] if is_file_or_folder else _expand_braces(location)
    files_by_path: dict[str, storage.FileInfo] = {}
    for pattern in patterns:
        matches = {
            file.path: file
            for file in list_files(pattern, suffix)
            if file.path.lower().endswith(suffix) or file.path == location
        }
        if not matches:
            raise config.ConfigError(
                f"data.path={path}: {pattern} is not a {suffix} file and contains none: "
                f"give a file, a folder of them, or a pattern such as "
                f"shards/*{suffix} or shards/{{0000..0127}}{suffix}."
            )
        files_by_path |= matches
    # Names are relative to the folder that the pattern begins with.
    prefix = location if is_file_or_folder else WILDCARD_PATTERN.split(location)[0]
    root = prefix if os.path.isdir(prefix) else prefix.rpartition("/")[0]
    return sorted(_make_shard(file, root, suffix) for file in files_by_path.values())


def hash_shards(shards: Sequence[ShardFile], *settings: str) -> str:
    """Return a hash of the shards' versions, their locations and the settings of their reader."""
    shard_states = [[resolve_address(shard.path), shard.size, shard.version] for shard in shards]
    return hashlib.sha256(json.dumps([settings, shard_states]).encode()).hexdigest()


@contextmanager
def open_shard(shard: ShardFile) -> Iterator[BinaryIO]:
    """Open a shard for reading it once from its beginning.

    Raises:
        DataError: The shard cannot be read.
    """
    with storage.open_stream(shard.path, shard.size) as file:
        yield file


def read_range(path: str, offset: int, size: int) -> bytes:
    """Read `size` bytes of a shard.

    Raises:
        DataError: The shard cannot be read, or is too short.
    """
    try:
        content = storage.read_bytes(path, offset, offset + size)
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): put it back, or download it again."
        ) from None
    if len(content) < size:
        raise DataError(
            f"{path} is shorter than it was at the start: put it back, or download it again."
        )
    return content


def _expand_braces(pattern: str) -> list[str]:
    """Expand {a,b} and {000..127}, which may be nested, as shells do."""
    match = BRACE_PATTERN.search(pattern)
    if not match:
        return [pattern]
    choices = match[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        has_leading_zeros = any(re.match("0.", number) for number in bounds.groups())
        num_digits = max(map(len, bounds.groups())) if has_leading_zeros else 1
        first, last = sorted(map(int, bounds.groups()))
        choices = [f"{number:0{num_digits}d}" for number in range(first, last + 1)]
    return [
        expansion
        for choice in choices
        for expansion in _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _list_local(pattern: str, suffix: str) -> list[storage.FileInfo]:
    if os.path.isdir(pattern):
        files, _ = storage.list_files(pattern)
        files = [file._replace(path=os.path.join(pattern, file.path)) for file in files]
        return [
            file
            for file in files
            if file.name.lower().endswith(suffix) and os.path.isfile(file.path)
        ]
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    return [storage.get_file_info(path) for path in paths if os.path.isfile(path)]


def _list_remote(pattern: str, suffix: str) -> list[storage.FileInfo]:
    """List the file with that address, or the files of a folder."""
    folder, slash, name = pattern.rpartition("/")
    if name and not WILDCARD_PATTERN.search(name):
        try:
            return [storage.get_file_info(pattern)]
        except FileNotFoundError:
            folder, name = pattern, ""  # it may be a folder without its "/"
    folder += slash
    try:
        files, _ = storage.list_files(folder)
    except NotADirectoryError:
        return []
    if name:
        files = [file for file in files if fnmatchcase(file.name, name) and "/" not in file.name]
    else:
        files = [file for file in files if file.name.lower().endswith(suffix)]
    matches = [file._replace(path=join_address(folder, file.path)) for file in files]
    # The listings of web servers do not give sizes.
    return [storage.get_file_info(file.path) if file.size is None else file for file in matches]


def _make_shard(file: storage.FileInfo, root: str, suffix: str) -> ShardFile:
    name = file.path.removeprefix(root).lstrip("/") if root else file.path
    name = name.replace(os.sep, "/").removesuffix(suffix)
    return ShardFile(name, file.path, file.size or 0, file.version)
