"""Shards: the few large files that a data set is divided into, and all that is asked of the place where they lie."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from radiance import config
from radiance.data.catalogue import DataError

BRACES = re.compile(r"\{([^{}]*)\}")  # the innermost
WILD = re.compile(r"[*?\[{]")


class Shard(NamedTuple):
    name: str  # within the folder that was given or that the pattern begins with, without the suffix and with "/"
    path: str
    size: int  # bytes
    changed: int  # nanoseconds, as the system counts


def find(path: str, suffix: str) -> list[Shard]:
    """The shards that `data.path` names, ordered by name: one file, a folder of files with that suffix (subfolders count, and names
    that begin with a dot do not), or a pattern of *, ?, [abc], {a,b} and {000..127}. What stands in braces must be there.

    Raises ConfigError when there is none.
    """
    given = os.path.expanduser(path)
    found: set[str] = set()
    for pattern in [given] if os.path.exists(given) else _alternatives(given):
        some = [file for file in _files(pattern, suffix) if file.endswith(suffix) or file == given]
        if not some:
            raise config.ConfigError(
                f"data.path={path}: {pattern} is no {suffix} file and has none in it: give a file, a folder of them, or a pattern such as "
                f"shards/*{suffix} or shards/{{0000..0127}}{suffix}."
            )
        found.update(some)
    begins = given if os.path.isdir(given) else os.path.dirname(given if os.path.exists(given) else WILD.split(given)[0] + "*")
    return sorted(_shard(file, begins or os.curdir, suffix) for file in found)


def identity(shards: Sequence[Shard], *settings: str) -> str:
    """Changes with the shards, with where they lie, and with the settings that they are read by."""
    told = [[os.path.abspath(shard.path), shard.size, shard.changed] for shard in shards]
    return hashlib.sha256(json.dumps([settings, told]).encode()).hexdigest()


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """To be gone through once. Raises DataError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): put it back, or fetch it again.") from None


def part(path: str, offset: int, size: int) -> bytes:
    """Some of its bytes. Raises DataError when they cannot be read."""
    with opened(path) as file:
        file.seek(offset)
        content = file.read(size)
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


def _files(pattern: str, suffix: str) -> list[str]:
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", f"*{suffix}")
    found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    return [file for file in found if os.path.isfile(file)]


def _shard(file: str, folder: str, suffix: str) -> Shard:
    status = os.stat(file)
    name = os.path.relpath(file, folder).replace(os.sep, "/").removesuffix(suffix)
    return Shard(name, file, status.st_size, status.st_mtime_ns)
