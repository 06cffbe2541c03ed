"""`tar`: shards as WebDataset has them: tar files in which files of one key are one sample.

A file's key is its path up to the first dot of its name: 0001/cat.jpg, 0001/cat.txt and 0001/cat.json say all of "0001/cat". A sample
has one picture; its captions are the lines of .txt, or else stand in .json, as do, in either case, `is_tag_based` and `loss_weight`
(data/records.py). Files with other suffixes are passed over, and so are names that begin with a dot.

Each shard is gone through once, when it is catalogued: heads of tar's members, captions, and heads of pictures. Then each picture is
read by itself, from where it lies in the shard. Of a shard that is cut short what is whole is used.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from radiance.data import records
from radiance.data.catalogue import DataError, Row, Unfit, head_of, in_threads
from radiance.data.decode import Broken
from radiance.data.folder import OTHER_SUFFIXES, SUFFIXES
from radiance.data.shards import Shard, find, identity, opened, part

# How files begin that are compressed, and the tool that unpacks them.
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
CUT = "shard cut short"


class Picture(NamedTuple):
    offset: int  # bytes, in the shard
    size: int
    width: int  # pixels, upright
    height: int
    content: str


class Tar:
    """Samples in the order in which their keys first appear, shard after shard. Names are SHARD/KEY.

    path: a shard, a folder of them, or a pattern. Raises ConfigError when there is none.
    """

    def __init__(self, path: str):
        self.shards = find(path, ".tar")
        self.paths = {shard.name: shard.path for shard in self.shards}
        self.identity = identity(self.shards, "tar")

    def __getstate__(self):
        return {"paths": self.paths}  # what reads pictures needs no more

    def rows(self, threads: int) -> Iterator[Row | Unfit]:
        for some in in_threads(_rows, self.shards, threads, chunk=1):
            yield from some

    def read(self, place: list) -> bytes:
        shard, offset, size = place
        return part(self.paths[shard], offset, size)


def _rows(shard: Shard) -> list[Row | Unfit]:
    samples: dict[str, dict[str, Any]] = {}  # by key and suffix
    with opened(shard) as file:
        _check(file, shard)
        whole = _go_through(file, shard, samples)
    rows = [_row(shard, key, files) for key, files in samples.items()]
    return rows if whole else [*rows, Unfit(shard.name, CUT)]


def _check(file: BinaryIO, shard: Shard):
    begin = file.read(8)
    for magic, tool in COMPRESSED.items():
        if begin.startswith(magic):
            raise DataError(f"{shard.path} is compressed, so that no picture in it can be found by itself: unpack it with {tool}.")
    file.seek(0)


def _go_through(file: BinaryIO, shard: Shard, samples: dict[str, dict[str, Any]]) -> bool:
    """Fills in the samples: of each, by suffix, what is known of its files. Whether the shard has its end."""
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while member := tar.next():
                tar.members.clear()  # which it would keep for others
                folder, name = posixpath.split(posixpath.normpath(member.name))
                stem, dot, suffix = name.partition(".")
                if member.isreg() and not member.issparse() and stem:
                    files = samples.setdefault(posixpath.join(folder, stem), {})
                    files[dot + suffix.lower()] = _looked_at(tar, member, shard, dot + suffix.lower())
            file.seek(tar.offset)
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        if not samples and shard.size >= tarfile.BLOCKSIZE:
            raise DataError(f"{shard.path} is no tar file ({error}): take it away, or fetch it again.") from None
        return False


def _looked_at(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Shard, suffix: str) -> Picture | bytes | Broken | None:
    """The head of a picture, or the whole of what says something of it; none of other files."""
    if suffix not in (*SUFFIXES, *OTHER_SUFFIXES, ".txt", ".json"):
        return None
    if suffix in OTHER_SUFFIXES:
        return Broken("format that is not read")
    if member.offset_data + member.size > shard.size:
        return Broken(CUT)
    file = tar.extractfile(member)
    if suffix not in SUFFIXES:
        return file.read()
    try:
        return Picture(member.offset_data, member.size, *head_of(file))
    except Broken as broken:
        return broken


def _row(shard: Shard, key: str, files: dict[str, Any]) -> Row | Unfit:
    """A sample."""
    name = f"{shard.name}/{key}"
    try:
        pictures = [file for suffix, file in files.items() if suffix in SUFFIXES or suffix in OTHER_SUFFIXES]
        if len(pictures) != 1:
            raise Broken("several pictures of one key" if pictures else "no picture")
        for file in files.values():
            if isinstance(file, Broken):
                raise file
        told = records.said(records.parsed(files[".json"])) if ".json" in files else records.Said()
        if ".txt" not in files and not told.captions:
            raise Broken("no caption")
        captions = records.captions_of(records.lines(files[".txt"]) if ".txt" in files else told.captions)
        weight = records.weight_of(told)
    except Broken as broken:
        return Unfit(name, broken.kind)
    offset, size, width, height, content = pictures[0]
    return Row(name, [shard.name, offset, size], captions, width, height, told.tags, weight, content)
