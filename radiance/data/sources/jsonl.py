"""`jsonl`: a list of images that lie anywhere, one JSON object a line, as the published models' trainer reads them.

{"filename": "cats/1.jpg", "caption_or_tags": "a cat", "width": 640, "height": 480, "is_tag_based": false, "loss_weight": 1.0}

`filename` is a path below data.root, or else below the file's own folder; or an absolute path; or a URL. A list for several captions.
"file_name" and "text" or "caption", as in metadata.jsonl, will do as well. Each line is an image: a second line for the same file is
another one, for lists of millions are read as a stream, by nobody who remembers what came before.

Width and height are believed where they stand, and nothing is asked of the file until it is needed; else its head is read. One that
is missing when it is needed is told once and passed over. What was learned is kept until the list changes.
"""

import hashlib
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator

from radiance import config
from radiance.data import decode, storage
from radiance.data.listing import IndexRecord, Unusable, map_in_threads
from radiance.data.sources.records import (
    clean_captions,
    parse_entry,
    read_header_at,
    validate_weight,
)


class JsonlListing:
    """The images of a list, in its order. root: the folder in which they are; empty: the list's own.

    Raises ConfigError when there is no such file or folder.
    """

    def __init__(self, path: str, root: str = ""):
        self.path = storage.resolve_address(path)
        self.root = storage.resolve_address(root) if root else storage.parent_address(self.path)
        try:
            file = storage.get_file_info(self.path)
        except (FileNotFoundError, PermissionError) as error:
            raise config.ConfigError(
                f"data.path={path} cannot be read ({error.strerror}): give a file with a JSON object a line."
            ) from None
        if root and not (storage.is_remote(root) or os.path.isdir(self.root)):
            raise config.ConfigError(
                f"data.root={root} is not a folder: give the one that holds the images of {path}."
            )
        identity_json = json.dumps([self.path, self.root, file.size, file.version])
        self.identity = hashlib.sha256(identity_json.encode()).hexdigest()

    def scan(self, num_threads: int) -> Iterator[IndexRecord | Unusable]:
        with storage.open_stream(self.path) as file:
            lines = (
                (line_number, line) for line_number, line in enumerate(file, 1) if line.strip()
            )
            yield from map_in_threads(self._make_record, lines, num_threads)

    def address(self, location: str) -> str:
        return storage.join_address(self.root, location)

    def read_file(self, location: str) -> bytes:
        try:
            return storage.read_bytes(self.address(location))
        except FileNotFoundError:
            raise decode.UnusableError("missing file") from None
        except PermissionError:
            raise decode.UnusableError("unreadable file") from None

    def _make_record(self, numbered_line: tuple[int, bytes]) -> IndexRecord | Unusable:
        line_number, line = numbered_line
        try:
            entry = parse_entry(line)
        except decode.UnusableError:
            return Unusable(f"line {line_number}", "bad line")
        name = (
            entry.filename
            if storage.is_remote(entry.filename)
            else posixpath.normpath(entry.filename)
        )
        name = unicodedata.normalize("NFC", name)
        try:
            captions, weight = (
                clean_captions(entry.annotation.captions),
                validate_weight(entry.annotation),
            )
            width, height, content_hash = entry.width, entry.height, ""
            if not (width and height):
                width, height, content_hash = read_header_at(self.address(entry.filename))
            if width * height > decode.MAX_PIXELS:
                raise decode.UnusableError("too large")
        except decode.UnusableError as error:
            return Unusable(name, error.kind)
        return IndexRecord(
            name,
            entry.filename,
            captions,
            width,
            height,
            entry.annotation.has_tags,
            weight,
            content_hash,
        )
