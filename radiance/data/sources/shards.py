"""Shards: the few large files that a data set is divided into, and all that is asked of the place where they lie."""

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

BRACE_PATTERN = re.compile(r"\{([^{}]*)\}")  # the innermost
WILDCARD_PATTERN = re.compile(r"[*?\[{]")


class ShardFile(NamedTuple):
    name: str  # within the folder that was given or that the pattern begins with, without the suffix and with "/"
    path: str  # or its address
    size: int  # bytes
    version: str  # changes with the content


def find_shards(path: str, suffix: str) -> list[ShardFile]:
    """The shards that `data.path` names, ordered by name: one file, a folder of files with that suffix (subfolders count, and names
    that begin with a dot do not), or a pattern of *, ?, [abc], {a,b} and {000..127}. What stands in braces must be there. Anywhere
    but on this machine, patterns are for names alone and a folder's address ends with "/".

    Raises ConfigError when there is none.
    """
    expanded_path, list_files = (
        (path, _list_remote) if storage.is_remote(path) else (os.path.expanduser(path), _list_local)
    )
    files_by_location: dict[str, storage.FileInfo] = {}
    for pattern in (
        [expanded_path] if os.path.exists(expanded_path) else _expand_braces(expanded_path)
    ):
        matches = {
            file.path: file
            for file in list_files(pattern, suffix)
            if file.path.endswith(suffix) or file.path == expanded_path
        }
        if not matches:
            raise config.ConfigError(
                f"data.path={path}: {pattern} is no {suffix} file and has none in it: give a file, a folder of them, or a pattern such as "
                f"shards/*{suffix} or shards/{{0000..0127}}{suffix}."
            )
        files_by_location |= matches
    fixed_prefix = (
        expanded_path if os.path.exists(expanded_path) else WILDCARD_PATTERN.split(expanded_path)[0]
    )
    root = fixed_prefix if os.path.isdir(fixed_prefix) else fixed_prefix.rpartition("/")[0]
    return sorted(_make_shard(file, root, suffix) for file in files_by_location.values())


def hash_shards(shards: Sequence[ShardFile], *settings: str) -> str:
    """Changes with the shards, with where they lie, and with the settings that they are read by."""
    shard_states = [
        [storage.resolve_address(shard.path), shard.size, shard.version] for shard in shards
    ]
    return hashlib.sha256(json.dumps([settings, shard_states]).encode()).hexdigest()


@contextmanager
def open_shard(shard: ShardFile) -> Iterator[BinaryIO]:
    """To be gone through once. Raises DataError when it cannot be read."""
    with storage.open_stream(shard.path, shard.size) as file:
        yield file


def read_range(path: str, offset: int, size: int) -> bytes:
    """Some of its bytes. Raises DataError when they cannot be read."""
    try:
        content = storage.read_bytes(path, offset, offset + size)
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): put it back, or fetch it again."
        ) from None
    if len(content) < size:
        raise DataError(
            f"{path} is shorter than it was at the start: put it back, or fetch it again."
        )
    return content


def _expand_braces(pattern: str) -> list[str]:
    """What braces stand for, as in shells: {a,b} and {000..127}, also within each other."""
    match = BRACE_PATTERN.search(pattern)
    if not match:
        return [pattern]
    choices = match[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        num_digits = (
            max(map(len, bounds.groups()))
            if any(re.match("0.", number) for number in bounds.groups())
            else 1
        )
        first, last = sorted(map(int, bounds.groups()))
        choices = [f"{number:0{num_digits}d}" for number in range(first, last + 1)]
    return [
        expansion
        for choice in choices
        for expansion in _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _list_local(pattern: str, suffix: str) -> list[storage.FileInfo]:
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", f"*{suffix}")
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    return [storage.get_file_info(path) for path in paths if os.path.isfile(path)]


def _list_remote(pattern: str, suffix: str) -> list[storage.FileInfo]:
    """Of an address: the file itself, or those of a folder."""
    folder, slash, name = pattern.rpartition("/")
    if name and not WILDCARD_PATTERN.search(name):
        try:
            return [storage.get_file_info(pattern)]
        except FileNotFoundError:
            folder, name = pattern, ""
    try:
        files, _ = storage.list_files(folder + slash)
    except NotADirectoryError:
        return []
    candidates = [
        file
        for file in files
        if (fnmatchcase(file.name, name) if name else file.name.endswith(suffix))
    ]
    matches = [
        file._replace(path=storage.join_address(folder + slash, file.path))
        for file in candidates
        if not (name and "/" in file.name)
    ]
    return [
        storage.get_file_info(file.path) if file.size is None else file for file in matches
    ]  # listings of web servers tell no sizes


def _make_shard(file: storage.FileInfo, folder: str, suffix: str) -> ShardFile:
    name = file.path.removeprefix(folder).lstrip("/") if folder else file.path
    return ShardFile(
        name.replace(os.sep, "/").removesuffix(suffix), file.path, file.size or 0, file.version
    )
