"""The data source `tar`: WebDataset shards, in which all files of one key are one sample.

A file's key is its path without its suffix: 0001/cat.jpg, 0001/cat.txt and 0001/cat.json all belong
to "0001/cat". A sample has one image. Its captions are the lines of .txt, or without that file are
in .json. In both cases `is_tag_based` and `loss_weight` are read from .json
(data/sources/records.py). Files with other suffixes and names that begin with a dot are skipped,
and so are files such as cat.mask.png beside cat.jpg: WebDataset assigns them to the sample "cat".

Each shard is read once, when it is indexed: the headers of tar members, the captions, and the
headers of images. Later each image is read by itself from its location in the shard. The complete
samples of a truncated shard are used. The standard library reads the members, and each must begin
after the previous one and state a size that a shard can have.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple, cast

from radiance.base.errors import DataError
from radiance.data.listing import (
    IndexRecord,
    UnusableRecord,
    compute_split_hash,
    map_in_threads,
    read_image_header,
)
from radiance.data.sources.folder import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES
from radiance.data.sources.records import (
    MAX_TEXT_BYTES,
    Annotation,
    decode_lines,
    make_record,
    parse_annotation,
    parse_json_object,
)
from radiance.data.sources.shards import ShardFile, find_shards, hash_shards, open_shard, read_range
from radiance.data.unusable import UnusableError

# First bytes of compressed files, and the tool that unpacks them.
COMPRESSION_TOOLS = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
TRUNCATED = "truncated shard"
# Types of members that hold names and other properties of the next member.
PROPERTY_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
# Errors that the standard library raises for broken members.
TAR_ERRORS = (
    *(tarfile.TarError, ValueError, LookupError, ArithmeticError),
    *(TypeError, AttributeError, RecursionError),
)


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

    def scan(self, num_threads: int) -> Iterator[IndexRecord | UnusableRecord]:
        """Yield a record for each sample.

        Raises:
            DataError: A shard cannot be read, is compressed, or is not a tar file.
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


def _read_shard(shard: ShardFile) -> list[IndexRecord | UnusableRecord]:
    samples: dict[str, dict[str, SampleFile]] = {}  # by key and suffix
    with open_shard(shard) as file:
        _check_uncompressed(file, shard)
        is_complete = _collect_samples(file, shard, samples)
    shard_records = [
        _make_record(shard, key, files)
        for key, files in samples.items()
        if not _is_companion(key, samples)
    ]
    return shard_records if is_complete else [*shard_records, UnusableRecord(shard.name, TRUNCATED)]


def _check_uncompressed(file: BinaryIO, shard: ShardFile):
    header = file.read(8)
    for magic, tool in COMPRESSION_TOOLS.items():
        if header.startswith(magic):
            raise DataError(
                f"{shard.path} is compressed, so that its images cannot be read one by one: "
                f"unpack it with {tool}."
            )
    file.seek(0)


class _BoundedTarInfo(tarfile.TarInfo):
    """A member whose size is not negative and whose properties fit into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_BoundedTarInfo":
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in PROPERTY_TYPES and member.size > MAX_TEXT_BYTES):
            raise tarfile.ReadError("bad size of a member")
        return member


def _iter_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a shard, each behind the previous one."""
    offset = 0
    while member := tar.next():
        if member.size < 0 or tar.offset <= offset:  # a size may also be stated by a property
            raise tarfile.ReadError("bad size of a member")
        offset = tar.offset
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] (it would keep them all)
        yield member


def _collect_samples(
    file: BinaryIO, shard: ShardFile, samples: dict[str, dict[str, SampleFile]]
) -> bool:
    """Fill in the files of all samples, and return whether the shard is complete."""
    try:
        with tarfile.open(
            fileobj=file,
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
            tarinfo=_BoundedTarInfo,
        ) as tar:
            for member in _iter_members(tar):
                key, suffix = posixpath.splitext(posixpath.normpath(member.name))
                is_hidden = posixpath.basename(key).startswith(".")
                if member.isreg() and not member.issparse() and not is_hidden:
                    files = samples.setdefault(key, {})
                    content = _read_member(tar, member, shard, suffix.lower())
                    if content is not None and files.get(suffix.lower()) is not None:
                        content = UnusableError("two files of one name")
                    files[suffix.lower()] = content
            file.seek(tar.offset)
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except TAR_ERRORS as error:
        if not samples and shard.size >= tarfile.BLOCKSIZE:
            raise DataError(
                f"{shard.path} is not a tar file ({error}): remove it, or download it again."
            ) from None
        return False


def _is_companion(key: str, samples: dict[str, dict[str, SampleFile]]) -> bool:
    """Return True for the key "cat.mask" if "cat" has an image."""
    folder, name = posixpath.split(key)
    stem, dot, _ = name.partition(".")
    sample_files = samples.get(posixpath.join(folder, stem), {}) if dot else {}
    return not IMAGE_SUFFIXES.isdisjoint(sample_files)


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
        if member.size > MAX_TEXT_BYTES:
            return UnusableError("too large")
        return file.read()
    try:
        return TarImage(member.offset_data, member.size, read_image_header(file))
    except UnusableError as error:
        return error


def _make_record(
    shard: ShardFile, key: str, files: dict[str, SampleFile]
) -> IndexRecord | UnusableRecord:
    name = f"{shard.name}/{key}"
    try:
        image = _find_image(files)
    except UnusableError as error:
        return UnusableRecord(name, error.kind)
    return make_record(
        name,
        [shard.name, image.offset, image.size],
        partial(_read_annotation, files),
        lambda: image.header,
        split_hash=compute_split_hash(f"{name}.tar"),  # a dot in a key begins no suffix
    )


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
