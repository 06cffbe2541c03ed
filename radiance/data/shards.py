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
from radiance.data import storage
from radiance.data.catalogue import DataError

BRACES = re.compile(r"\{([^{}]*)\}")  # the innermost
WILD = re.compile(r"[*?\[{]")


class Shard(NamedTuple):
    name: str  # within the folder that was given or that the pattern begins with, without the suffix and with "/"
    path: str  # or its address
    size: int  # bytes
    stamp: str  # changes with the content


def find(path: str, suffix: str) -> list[Shard]:
    """The shards that `data.path` names, ordered by name: one file, a folder of files with that suffix (subfolders count, and names
    that begin with a dot do not), or a pattern of *, ?, [abc], {a,b} and {000..127}. What stands in braces must be there. Anywhere
    but on this machine, patterns are for names alone and a folder's address ends with "/".

    Raises ConfigError when there is none.
    """
    given, look = (path, _remote) if storage.is_remote(path) else (os.path.expanduser(path), _local)
    found: dict[str, storage.File] = {}
    for pattern in [given] if os.path.exists(given) else _alternatives(given):
        some = {file.place: file for file in look(pattern, suffix) if file.place.endswith(suffix) or file.place == given}
        if not some:
            raise config.ConfigError(
                f"data.path={path}: {pattern} is no {suffix} file and has none in it: give a file, a folder of them, or a pattern such as "
                f"shards/*{suffix} or shards/{{0000..0127}}{suffix}."
            )
        found |= some
    whole = given if os.path.exists(given) else WILD.split(given)[0]
    begins = whole if os.path.isdir(whole) else whole.rpartition("/")[0]
    return sorted(_shard(file, begins, suffix) for file in found.values())


def identity(shards: Sequence[Shard], *settings: str) -> str:
    """Changes with the shards, with where they lie, and with the settings that they are read by."""
    told = [[storage.absolute(shard.path), shard.size, shard.stamp] for shard in shards]
    return hashlib.sha256(json.dumps([settings, told]).encode()).hexdigest()


@contextmanager
def opened(shard: Shard) -> Iterator[BinaryIO]:
    """To be gone through once. Raises DataError when it cannot be read."""
    with storage.stream(shard.path, shard.size) as file:
        yield file


def part(path: str, offset: int, size: int) -> bytes:
    """Some of its bytes. Raises DataError when they cannot be read."""
    try:
        content = storage.read(path, offset, offset + size)
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): put it back, or fetch it again.") from None
    if len(content) < size:
        raise DataError(f"{path} is shorter than it was at the start: put it back, or fetch it again.")
    return content


def _alternatives(pattern: str) -> list[str]:
    """What braces stand for, as in shells: {a,b} and {000..127}, also within each other."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    choices = found[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        digits = max(map(len, numbers.groups())) if any(re.match("0.", number) for number in numbers.groups()) else 1
        first, last = sorted(map(int, numbers.groups()))
        choices = [f"{number:0{digits}d}" for number in range(first, last + 1)]
    return [word for choice in choices for word in _alternatives(pattern[: found.start()] + choice + pattern[found.end() :])]


def _local(pattern: str, suffix: str) -> list[storage.File]:
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", f"*{suffix}")
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    return [storage.file(path) for path in found if os.path.isfile(path)]


def _remote(pattern: str, suffix: str) -> list[storage.File]:
    """Of an address: the file itself, or those of a folder."""
    folder, slash, name = pattern.rpartition("/")
    if name and not WILD.search(name):
        try:
            return [storage.file(pattern)]
        except FileNotFoundError:
            folder, name = pattern, ""
    try:
        files, _ = storage.files(folder + slash)
    except NotADirectoryError:
        return []
    inside = [file for file in files if (fnmatchcase(file.name, name) if name else file.name.endswith(suffix))]
    found = [file._replace(place=storage.join(folder + slash, file.place)) for file in inside if not (name and "/" in file.name)]
    return [storage.file(file.place) if file.size is None else file for file in found]  # listings of web servers tell no sizes


def _shard(file: storage.File, folder: str, suffix: str) -> Shard:
    name = file.place.removeprefix(folder).lstrip("/") if folder else file.place
    return Shard(name.replace(os.sep, "/").removesuffix(suffix), file.place, file.size or 0, file.stamp)
