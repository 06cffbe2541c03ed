"""The data source `jsonl`: a list of images, in the format of the published models' trainer.

The file has one JSON object a line::

    {"filename": "cats/1.jpg", "caption_or_tags": "a cat", "width": 640, "height": 480,
     "is_tag_based": false, "loss_weight": 1.0}

`filename` is a path below data.root (by default the folder of the list), an absolute path or a URL.
URLs and absolute paths need their protocol in data.protocols (data/addresses.py). A list holds
several captions. "file_name", and "text" or "caption", are accepted as in metadata.jsonl. Every
line is an image, also a second line for the same file: a list of millions is read as a stream.

A width and a height in the list are trusted, and the file is not opened before it is needed.
Without them its header is read. A file that is missing when it is needed is reported once and
skipped. The dataset index is kept until the list changes, or a local file whose header was read.
"""

import hashlib
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence

from radiance import config
from radiance.base.text_files import iter_lines
from radiance.data import decode, storage
from radiance.data.addresses import is_remote, parent_address, resolve_address, resolve_filename
from radiance.data.listing import IndexRecord, UnusableRecord, map_in_threads
from radiance.data.sources.records import (
    MAX_TEXT_BYTES,
    MetadataEntry,
    make_record,
    parse_entry,
    read_header_at,
    translate_file_errors,
)
from radiance.data.unusable import UnusableError


class JsonlListing:
    """The images of a list, in its order.

    Args:
        path: Path or URL of the list.
        root: Folder of the images. If empty, the list's folder.
        protocols: Protocols that the lines may name.

    Raises:
        ConfigError: There is no such file or folder.
    """

    def __init__(self, path: str, root: str = "", protocols: Sequence[str] = ()):
        self.path, self.protocols = resolve_address(path), tuple(protocols)
        self.root = resolve_address(root) if root else parent_address(self.path)
        try:
            file = storage.get_file_info(self.path)
        except (FileNotFoundError, PermissionError) as error:
            raise config.ConfigError(
                f"data.path={path} cannot be read ({error.strerror}): "
                "give a file with one JSON object a line."
            ) from None
        if root and not (is_remote(self.root) or os.path.isdir(self.root)):
            raise config.ConfigError(
                f"data.root={root} is not a folder: give the folder of the images of {path}."
            )
        identity_json = json.dumps([self.path, self.root, self.protocols, file.size, file.version])
        self.identity = hashlib.sha256(identity_json.encode()).hexdigest()

    def scan(self, num_threads: int) -> Iterator[IndexRecord | UnusableRecord]:
        """Yield a record for each line."""
        with storage.open_stream(self.path) as file:
            numbered_lines = (
                (line_number, line)
                for line_number, line in enumerate(iter_lines(file, MAX_TEXT_BYTES), 1)
                if line is None or line.strip()
            )
            yield from map_in_threads(self._make_record, numbered_lines, num_threads)

    def address(self, location: str) -> str:
        """Return the path or URL of an image's file.

        Raises:
            UnusableError: The settings do not allow it.
        """
        return resolve_filename(self.root, location, self.protocols)

    def read_file(self, location: str) -> bytes:
        """Read an image's file.

        Raises:
            UnusableError: The file is missing, unreadable, too large or not allowed.
        """
        address = self.address(location)
        with translate_file_errors(address):
            return storage.read_file(address)

    def _make_record(self, numbered_line: tuple[int, bytes | None]) -> IndexRecord | UnusableRecord:
        line_number, line = numbered_line
        try:
            entry = parse_entry(line)
        except UnusableError:
            return UnusableRecord(f"line {line_number}", "bad line")
        name = entry.filename
        if not is_remote(name):
            name = posixpath.normpath(name)
        name = unicodedata.normalize("NFC", name)
        # A file whose header is read may change without a change of the list.
        file_state = "" if entry.width and entry.height else self._get_file_state(entry.filename)
        record = make_record(
            name, entry.filename, lambda: entry.annotation, lambda: self._read_header(entry)
        )
        return record._replace(file_state=file_state) if isinstance(record, IndexRecord) else record

    def _get_file_state(self, filename: str) -> str:
        """Return the state of a local file, or nothing for remote ones, whose requests are slow."""
        try:
            address = self.address(filename)
        except UnusableError:
            return ""
        return "" if is_remote(address) else storage.get_file_state(address)

    def _read_header(self, entry: MetadataEntry) -> tuple[int, int, str]:
        """Return the size that the list gives, or read it from the file."""
        address = self.address(entry.filename)
        width, height, content_hash = entry.width, entry.height, ""
        if not (width and height):
            width, height, content_hash = read_header_at(address)
        if width * height > decode.MAX_PIXELS:
            raise UnusableError("too large")
        return width, height, content_hash
