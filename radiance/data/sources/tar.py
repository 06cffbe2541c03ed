"""The data source `tar`: WebDataset shards, in which all files of one key are one sample.

A file's key is its path up to the first dot of its name: 0001/cat.jpg, 0001/cat.txt and
0001/cat.json all belong to "0001/cat". A sample has one image. Its captions are the lines of .txt,
or without that file are in .json. In both cases `is_tag_based` and `loss_weight` are read from
.json (data/sources/records.py). Files with other suffixes and names that begin with a dot are
skipped.

Each shard is read once, when it is indexed: the headers of tar members, the captions, and the
headers of images. Later each image is read by itself from its location in the shard. The complete
samples of a truncated shard are used.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple, cast

from radiance.base.errors import DataError
from radiance.data.decode import UnusableError
from radiance.data.listing import IndexRecord, Unusable, map_in_threads, read_image_header
from radiance.data.sources.folder import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES
from radiance.data.sources.records import (
    Annotation,
    decode_lines,
    make_record,
    parse_annotation,
    parse_json_object,
)
from radiance.data.sources.shards import ShardFile, find_shards, hash_shards, open_shard, read_range

# First bytes of compressed files, and the tool that unpacks them.
COMPRESSION_TOOLS = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
TRUNCATED = "truncated shard"


class TarImage(NamedTuple):
    """An image within a shard."""

    offset: int  # bytes
    size: int
    header: tuple[int, int, str]  # width, height and content hash


# The content of a text file, or the reason why a file cannot be used. None: not needed.
SampleFile = TarImage | bytes | UnusableError | None


class TarListing:
    """Samples in the order in which their keys first appear, shard after shard.

    Names are SHARD/KEY.

    Args:
        path: A shard, a folder of shards, or a pattern.

    Raises:
        ConfigError: There is no such shard.
    """

    def __init__(self, path: str):
        self.shards = find_shards(path, ".tar")
        self.paths = {shard.name: shard.path for shard in self.shards}
        self.identity = hash_shards(self.shards, "tar")

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}  # reading images needs nothing else

    def scan(self, num_threads: int) -> Iterator[IndexRecord | Unusable]:
        """Yield a record for each sample.

        Raises:
            DataError: A shard cannot be read, is compressed, or is no tar file.
        """
        for shard_records in map_in_threads(_read_shard, self.shards, num_threads, chunk_size=1):
            yield from shard_records

    def address(self, location: list) -> None:
        """Return None: an image is a part of a shard."""
        return None

    def read_file(self, location: list) -> bytes:
        """Read an image's file.

        Raises:
            DataError: The shard cannot be read, or is too short.
        """
        shard_name, offset, size = location
        return read_range(self.paths[shard_name], offset, size)


def _read_shard(shard: ShardFile) -> list[IndexRecord | Unusable]:
    samples: dict[str, dict[str, SampleFile]] = {}  # by key and suffix
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
                f"{shard.path} is compressed, so that its images cannot be read one by one: "
                f"unpack it with {tool}."
            )
    file.seek(0)


def _collect_samples(
    file: BinaryIO, shard: ShardFile, samples: dict[str, dict[str, SampleFile]]
) -> bool:
    """Fill in the files of all samples, and return whether the shard is complete."""
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while member := tar.next():
                # The module would keep every member in memory.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                folder, name = posixpath.split(posixpath.normpath(member.name))
                stem, dot, suffix = name.partition(".")
                if member.isreg() and not member.issparse() and stem:
                    suffix = dot + suffix.lower()
                    files = samples.setdefault(posixpath.join(folder, stem), {})
                    files[suffix] = _read_member(tar, member, shard, suffix)
            file.seek(tar.offset)
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        if not samples and shard.size >= tarfile.BLOCKSIZE:
            raise DataError(
                f"{shard.path} is not a tar file ({error}): remove it, or download it again."
            ) from None
        return False


def _read_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, shard: ShardFile, suffix: str
) -> SampleFile:
    """Read the header of an image, or the content of a file that annotates it."""
    if suffix not in (*IMAGE_SUFFIXES, *UNSUPPORTED_SUFFIXES, ".txt", ".json"):
        return None
    if suffix in UNSUPPORTED_SUFFIXES:
        return UnusableError("unsupported format")
    if member.offset_data + member.size > shard.size:
        return UnusableError(TRUNCATED)
    file = cast(BinaryIO, tar.extractfile(member))  # not None, because it is a regular file
    if suffix not in IMAGE_SUFFIXES:
        return file.read()
    try:
        return TarImage(member.offset_data, member.size, read_image_header(file))
    except UnusableError as error:
        return error


def _make_record(
    shard: ShardFile, key: str, files: dict[str, SampleFile]
) -> IndexRecord | Unusable:
    name = f"{shard.name}/{key}"
    try:
        image = _find_image(files)
    except UnusableError as error:
        return Unusable(name, error.kind)
    location = [shard.name, image.offset, image.size]
    return make_record(name, location, partial(_read_annotation, files), lambda: image.header)


def _find_image(files: dict[str, SampleFile]) -> TarImage:
    """Return the only image of a sample, all of whose files can be used."""
    image_suffixes = IMAGE_SUFFIXES.union(UNSUPPORTED_SUFFIXES)
    images = [file for suffix, file in files.items() if suffix in image_suffixes]
    if len(images) != 1:
        raise UnusableError("several images of one key" if images else "no image")
    for file in files.values():
        if isinstance(file, UnusableError):
            raise file
    (image,) = images
    assert isinstance(image, TarImage)
    return image


def _read_annotation(files: dict[str, SampleFile]) -> Annotation:
    texts = {suffix: file for suffix, file in files.items() if isinstance(file, bytes)}
    annotation = Annotation()
    if ".json" in texts:
        annotation = parse_annotation(parse_json_object(texts[".json"]))
    if ".txt" in texts:
        return annotation._replace(captions=decode_lines(texts[".txt"]))
    if not annotation.captions:
        raise UnusableError("no caption")
    return annotation
