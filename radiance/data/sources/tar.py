"""`tar`: shards as WebDataset has them: tar files in which files of one key are one sample.

A file's key is its path up to the first dot of its name: 0001/cat.jpg, 0001/cat.txt and 0001/cat.json say all of "0001/cat". A sample
has one image; its captions are the lines of .txt, or else stand in .json, as do, in either case, `is_tag_based` and `loss_weight`
(data/records.py). Files with other suffixes are passed over, and so are names that begin with a dot.

Each shard is gone through once, when it is catalogued: heads of tar's members, captions, and heads of images. Then each image is
read by itself, from where it lies in the shard. Of a shard that is cut short what is whole is used.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from radiance.base.errors import DataError
from radiance.data.decode import UnusableError
from radiance.data.listing import IndexRecord, Unusable, map_in_threads, read_image_header
from radiance.data.sources import records
from radiance.data.sources.folder import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES
from radiance.data.sources.shards import ShardFile, find_shards, hash_shards, open_shard, read_range

# How files begin that are compressed, and the tool that unpacks them.
COMPRESSION_TOOLS = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
TRUNCATED = "shard cut short"


class TarImage(NamedTuple):
    offset: int  # bytes, in the shard
    size: int
    width: int  # pixels, upright
    height: int
    content_hash: str


class TarListing:
    """Samples in the order in which their keys first appear, shard after shard. Names are SHARD/KEY.

    path: a shard, a folder of them, or a pattern. Raises ConfigError when there is none.
    """

    def __init__(self, path: str):
        self.shards = find_shards(path, ".tar")
        self.paths = {shard.name: shard.path for shard in self.shards}
        self.identity = hash_shards(self.shards, "tar")

    def __getstate__(self):
        return {"paths": self.paths}  # what reads images needs no more

    def scan(self, num_threads: int) -> Iterator[IndexRecord | Unusable]:
        for shard_records in map_in_threads(_read_shard, self.shards, num_threads, chunk_size=1):
            yield from shard_records

    def address(self, location: list) -> None:
        """Return None: an image is a part of a shard."""
        return None

    def read_file(self, location: list) -> bytes:
        shard, offset, size = location
        return read_range(self.paths[shard], offset, size)


def _read_shard(shard: ShardFile) -> list[IndexRecord | Unusable]:
    samples: dict[str, dict[str, Any]] = {}  # by key and suffix
    with open_shard(shard) as file:
        _check_uncompressed(file, shard)
        is_complete = _collect_samples(file, shard, samples)
    shard_records = [_make_record(shard, key, files) for key, files in samples.items()]
    return shard_records if is_complete else [*shard_records, Unusable(shard.name, TRUNCATED)]


def _check_uncompressed(file: BinaryIO, shard: ShardFile):
    header = file.read(8)
    for magic, tool in COMPRESSION_TOOLS.items():
        if header.startswith(magic):
            raise DataError(
                f"{shard.path} is compressed, so that no image in it can be found by itself: unpack it with {tool}."
            )
    file.seek(0)


def _collect_samples(file: BinaryIO, shard: ShardFile, samples: dict[str, dict[str, Any]]) -> bool:
    """Fills in the samples: of each, by suffix, what is known of its files. Whether the shard has its end."""
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while member := tar.next():
                tar.members.clear()  # which it would keep for others
                folder, name = posixpath.split(posixpath.normpath(member.name))
                stem, dot, suffix = name.partition(".")
                if member.isreg() and not member.issparse() and stem:
                    files = samples.setdefault(posixpath.join(folder, stem), {})
                    files[dot + suffix.lower()] = _read_member(
                        tar, member, shard, dot + suffix.lower()
                    )
            file.seek(tar.offset)
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        if not samples and shard.size >= tarfile.BLOCKSIZE:
            raise DataError(
                f"{shard.path} is no tar file ({error}): take it away, or fetch it again."
            ) from None
        return False


def _read_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, shard: ShardFile, suffix: str
) -> TarImage | bytes | UnusableError | None:
    """The head of an image, or the whole of what says something of it; none of other files."""
    if suffix not in (*IMAGE_SUFFIXES, *UNSUPPORTED_SUFFIXES, ".txt", ".json"):
        return None
    if suffix in UNSUPPORTED_SUFFIXES:
        return UnusableError("format that is not read")
    if member.offset_data + member.size > shard.size:
        return UnusableError(TRUNCATED)
    file = tar.extractfile(member)
    if suffix not in IMAGE_SUFFIXES:
        return file.read()
    try:
        return TarImage(member.offset_data, member.size, *read_image_header(file))
    except UnusableError as error:
        return error


def _make_record(shard: ShardFile, key: str, files: dict[str, Any]) -> IndexRecord | Unusable:
    """A sample."""
    name = f"{shard.name}/{key}"
    try:
        images = [
            file
            for suffix, file in files.items()
            if suffix in IMAGE_SUFFIXES or suffix in UNSUPPORTED_SUFFIXES
        ]
        if len(images) != 1:
            raise UnusableError("several images of one key" if images else "no image")
        for file in files.values():
            if isinstance(file, UnusableError):
                raise file
        annotation = (
            records.parse_annotation(records.parse_json_object(files[".json"]))
            if ".json" in files
            else records.Annotation()
        )
        if ".txt" not in files and not annotation.captions:
            raise UnusableError("no caption")
        captions = records.clean_captions(
            records.decode_lines(files[".txt"]) if ".txt" in files else annotation.captions
        )
        weight = records.validate_weight(annotation)
    except UnusableError as error:
        return Unusable(name, error.kind)
    offset, size, width, height, content_hash = images[0]
    return IndexRecord(
        name,
        [shard.name, offset, size],
        captions,
        width,
        height,
        annotation.has_tags,
        weight,
        content_hash,
    )
