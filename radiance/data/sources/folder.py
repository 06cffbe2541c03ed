"""The data source `folder`: images with captions beside them, on a disk or anywhere fsspec reaches.

The captions of cat.png are the lines of cat.txt or cat.TXT. Without that file they are in a
metadata.jsonl of its folder or of a parent folder, as in Hugging Face's `imagefolder`::

    {"file_name": "cat.png", "text": "a cat"}

"caption" may replace "text", and a list holds several captions. "is_tag_based": true declares tags
with commas between them, and "loss_weight": 2 doubles the weight of the image. Subfolders are
included, links are followed, and names that begin with a dot are skipped.

When a run starts, all captions and the headers of all images are read. Unusable images are left out
and counted by kind. Pixels are decoded when they are needed (data/decode.py), because decoding
millions of files first would take hours. An image that fails to decode then is reported once and
skipped every time. In a remote folder each header takes one or two requests. For millions of images
use `jsonl`, which declares the sizes, or shards.
"""

import hashlib
import json
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.base.text_files import iter_lines
from radiance.data import decode, storage
from radiance.data.addresses import join_address, resolve_address
from radiance.data.listing import IndexRecord, UnusableRecord, map_in_threads
from radiance.data.sources.records import (
    MAX_TEXT_BYTES,
    Annotation,
    decode_lines,
    make_record,
    parse_entry,
    read_header_at,
    translate_file_errors,
)
from radiance.data.storage import FileInfo
from radiance.data.unusable import UnusableError

IMAGE_SUFFIXES = frozenset(
    suffix
    for suffix, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in decode.EXCLUDED_FORMATS
)
# Suffixes of images that Pillow can only read with plugins.
UNSUPPORTED_SUFFIXES = (".heic", ".heif", ".jxl")
METADATA_FILE = "metadata.jsonl"


class FolderListing:
    """A folder of captioned images, ordered by name.

    Args:
        path: Path or URL of the folder.

    Raises:
        ConfigError: The path is not a folder.
    """

    def __init__(self, path: str):
        self.path = resolve_address(path)
        try:
            self.files, self.unreadable_folders = storage.list_files(self.path)
        except NotADirectoryError:
            raise config.ConfigError(
                f"data.path={path} is not a folder: give a folder of images and captions."
            ) from None
        hasher = hashlib.sha256(self.path.encode(errors="surrogatepass"))
        for file in self.files:
            hasher.update(json.dumps([file.name, file.size, file.version]).encode())
        hasher.update(json.dumps(self.unreadable_folders).encode())
        self.identity = hasher.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # reading images needs nothing else

    def scan(self, num_threads: int) -> Iterator[IndexRecord | UnusableRecord]:
        """Yield unreadable folders, bad lines and missing files, then a record for each image."""
        metadata, bad_lines = self._read_metadata()
        # The suffix may have any case. Of .TXT and .txt, the latter is used: it is later in order.
        caption_files = {
            posixpath.splitext(file.name)[0]: file.path
            for file in self.files
            if _suffix(file) == ".txt"
        }
        image_suffixes = IMAGE_SUFFIXES.union(UNSUPPORTED_SUFFIXES)
        images = [
            file for file in self.files if _suffix(file) in image_suffixes or file.name in metadata
        ]
        missing_files = sorted(metadata.keys() - {file.name for file in self.files})
        yield from (UnusableRecord(name, "unreadable folder") for name in self.unreadable_folders)
        yield from (
            UnusableRecord(location, f"bad line of {METADATA_FILE}") for location in bad_lines
        )
        yield from (UnusableRecord(name, "missing file") for name in missing_files)
        yield from map_in_threads(
            partial(self._make_record, caption_files=caption_files, metadata=metadata),
            images,
            num_threads,
        )

    def address(self, location: str) -> str:
        """Return the path or URL of an image's file."""
        return join_address(self.path, location)

    def read_file(self, location: str) -> bytes:
        """Read an image's file.

        Raises:
            UnusableError: The file is too large.
            DataError: The file cannot be read any more.
        """
        address = self.address(location)
        try:
            return storage.read_file(address)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(
                f"{address} existed at the start and cannot be read now ({error.strerror}): "
                "put it back."
            ) from None

    def _read_metadata(self) -> tuple[dict[str, Annotation], list[str]]:
        """Read the annotations by the images' names, and the locations of unusable lines."""
        metadata: dict[str, Annotation] = {}
        bad_lines = []
        for file in self.files:
            folder, file_name = posixpath.split(file.name)
            if file_name.lower() != METADATA_FILE:
                continue
            with storage.open_stream(self.address(file.path), file.size) as stream:
                for line_number, line in enumerate(iter_lines(stream, MAX_TEXT_BYTES), 1):
                    if line is not None and not line.strip():
                        continue
                    try:
                        entry = parse_entry(line)
                    except UnusableError:
                        bad_lines.append(f"{file.name}:{line_number}")
                        continue
                    name = posixpath.normpath(posixpath.join(folder, entry.filename))
                    name = unicodedata.normalize("NFC", name)
                    previous_captions = metadata[name].captions if name in metadata else ()
                    captions = (*previous_captions, *entry.annotation.captions)
                    metadata[name] = entry.annotation._replace(captions=captions)
        return metadata, bad_lines

    def _make_record(
        self, file: FileInfo, caption_files: Mapping[str, str], metadata: Mapping[str, Annotation]
    ) -> IndexRecord | UnusableRecord:
        if _suffix(file) not in IMAGE_SUFFIXES and _suffix(file) in UNSUPPORTED_SUFFIXES:
            return UnusableRecord(file.name, "unsupported format")
        caption_file = caption_files.get(posixpath.splitext(file.name)[0])
        annotation = metadata.get(file.name)
        if caption_file is None and annotation is None:
            return UnusableRecord(file.name, "no caption")
        return make_record(
            file.name,
            file.path,
            partial(self._read_annotation, caption_file, annotation or Annotation()),
            lambda: read_header_at(self.address(file.path), file.size),
        )

    def _read_annotation(self, caption_file: str | None, annotation: Annotation) -> Annotation:
        """Replace the captions of an annotation by the lines of the image's caption file."""
        if caption_file is None:
            return annotation
        address = self.address(caption_file)
        with translate_file_errors(address):
            content = storage.read_file(address, MAX_TEXT_BYTES)
        return annotation._replace(captions=decode_lines(content))


def _suffix(file: FileInfo) -> str:
    return posixpath.splitext(file.name)[1].lower()
