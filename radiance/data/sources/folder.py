"""`folder`: images with captions as people keep them, read where they lie: on a disk, or anywhere fsspec reaches.

The captions of cat.png stand in cat.txt beside it, one a line, or else in a metadata.jsonl of its folder or of one above, as in
Hugging Face's `imagefolder`: {"file_name": "cat.png", "text": "a cat"}, where "caption" will do for "text", and a list for several;
"is_tag_based": true says that they are tags with commas between, and "loss_weight": 2 that the image counts twice.
Subfolders count, links are followed, and names that begin with a dot are passed over.

When a run starts, all captions and the heads of all images are read, and what cannot be used is left out and counted by kind.
Pixels are decoded when they are needed (data/decode.py): decoding millions of files first would take hours. An image that turns out
broken then is told once and passed over, every time. Of a remote folder each head takes a request or two: for millions, `jsonl`
declares what the heads would say, and shards need no looking for.
"""

import hashlib
import json
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from functools import partial

from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.data import decode, storage
from radiance.data.listing import IndexRecord, Unusable, map_in_threads
from radiance.data.sources.records import (
    Annotation,
    clean_captions,
    decode_lines,
    parse_entry,
    read_header_at,
    validate_weight,
)
from radiance.data.storage import FileInfo

IMAGE_SUFFIXES = frozenset(
    suffix
    for suffix, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in decode.EXCLUDED_FORMATS
)
UNSUPPORTED_SUFFIXES = (
    ".heic",
    ".heif",
    ".jxl",
)  # images to people, but not to Pillow without its plugins
METADATA_FILE = "metadata.jsonl"


class FolderListing:
    """A folder of captioned images, ordered by name.

    Raises ConfigError when the path is not a folder.
    """

    def __init__(self, path: str):
        self.path = storage.resolve_address(path)
        try:
            self.files, self.unreadable_folders = storage.list_files(self.path)
        except NotADirectoryError:
            raise config.ConfigError(
                f"data.path={path} is not a folder: give one that holds images and their captions."
            ) from None
        hasher = hashlib.sha256(self.path.encode(errors="surrogatepass"))
        for file in self.files:
            hasher.update(json.dumps([file.name, file.size, file.version]).encode())
        hasher.update(json.dumps(self.unreadable_folders).encode())
        self.identity = hasher.hexdigest()

    def __getstate__(self):
        return {"path": self.path}  # what reads images needs no more

    def scan(self, num_threads: int) -> Iterator[IndexRecord | Unusable]:
        metadata, bad_lines = self._read_metadata()
        caption_files = {file.name: file.path for file in self.files if file.name.endswith(".txt")}
        images = [
            file
            for file in self.files
            if _suffix(file) in IMAGE_SUFFIXES.union(UNSUPPORTED_SUFFIXES) or file.name in metadata
        ]
        yield from (Unusable(name, "closed folder") for name in self.unreadable_folders)
        yield from (Unusable(location, f"bad line of {METADATA_FILE}") for location in bad_lines)
        yield from (
            Unusable(name, "missing file")
            for name in sorted(metadata.keys() - {file.name for file in self.files})
        )
        yield from map_in_threads(
            partial(self._make_record, caption_files=caption_files, metadata=metadata),
            images,
            num_threads,
        )

    def address(self, location: str) -> str:
        return storage.join_address(self.path, location)

    def read_file(self, location: str) -> bytes:
        address = self.address(location)
        try:
            return storage.read_bytes(address)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(
                f"{address} was there at the start and cannot be read now ({error.strerror}): put it back."
            ) from None

    def _read_metadata(self) -> tuple[dict[str, Annotation], list[str]]:
        """What is said of images, by their names, and the places of lines that say nothing."""
        metadata: dict[str, Annotation] = {}
        bad_lines = []
        for file in self.files:
            if posixpath.basename(file.name) != METADATA_FILE:
                continue
            for line_number, line in enumerate(self.read_file(file.path).split(b"\n"), 1):
                if not line.strip():
                    continue
                try:
                    entry = parse_entry(line)
                except decode.UnusableError:
                    bad_lines.append(f"{file.name}:{line_number}")
                else:
                    name = posixpath.normpath(
                        posixpath.join(posixpath.dirname(file.name), entry.filename)
                    )
                    name = unicodedata.normalize("NFC", name)
                    previous_captions = metadata[name].captions if name in metadata else ()
                    metadata[name] = entry.annotation._replace(
                        captions=(*previous_captions, *entry.annotation.captions)
                    )
        return metadata, bad_lines

    def _make_record(
        self, file: FileInfo, caption_files: Mapping[str, str], metadata: Mapping[str, Annotation]
    ) -> IndexRecord | Unusable:
        """What a run needs to know of an image."""
        if _suffix(file) not in IMAGE_SUFFIXES and _suffix(file) in UNSUPPORTED_SUFFIXES:
            return Unusable(file.name, "format that is not read")
        caption_file, annotation = (
            caption_files.get(posixpath.splitext(file.name)[0] + ".txt"),
            metadata.get(file.name),
        )
        if caption_file is None and annotation is None:
            return Unusable(file.name, "no caption")
        annotation = annotation or Annotation()
        try:
            captions, weight = (
                clean_captions(
                    annotation.captions
                    if caption_file is None
                    else self._read_captions(caption_file)
                ),
                validate_weight(annotation),
            )
            width, height, content_hash = read_header_at(self.address(file.path), file.size)
        except decode.UnusableError as error:
            return Unusable(file.name, error.kind)
        return IndexRecord(
            file.name, file.path, captions, width, height, annotation.has_tags, weight, content_hash
        )

    def _read_captions(self, location: str) -> list[str]:
        """The lines of the file of captions. Raises Broken when it cannot be read."""
        try:
            return decode_lines(storage.read_bytes(self.address(location)))
        except (FileNotFoundError, PermissionError):
            raise decode.UnusableError("unreadable file") from None


def _suffix(file: FileInfo) -> str:
    return posixpath.splitext(file.name)[1].lower()
