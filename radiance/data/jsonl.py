"""`jsonl`: a list of pictures that lie anywhere, one JSON object a line, as the published models' trainer reads them.

{"filename": "cats/1.jpg", "caption_or_tags": "a cat", "width": 640, "height": 480, "is_tag_based": false, "loss_weight": 1.0}

`filename` is a path below data.root, or else below the file's own folder; or an absolute path; or a URL. A list for several captions.
"file_name" and "text" or "caption", as in metadata.jsonl, will do as well. Each line is a picture: a second line for the same file is
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
from radiance.data.catalogue import Row, Unfit, in_threads
from radiance.data.records import captions_of, entry_of, look_at, weight_of


class Jsonl:
    """The pictures of a list, in its order. root: the folder in which they are; empty: the list's own.

    Raises ConfigError when there is no such file or folder.
    """

    def __init__(self, path: str, root: str = ""):
        self.path = storage.absolute(path)
        self.root = storage.absolute(root) if root else storage.parent(self.path)
        try:
            file = storage.file(self.path)
        except (FileNotFoundError, PermissionError) as error:
            raise config.ConfigError(
                f"data.path={path} cannot be read ({error.strerror}): give a file with a JSON object a line."
            ) from None
        if root and not (storage.is_remote(root) or os.path.isdir(self.root)):
            raise config.ConfigError(f"data.root={root} is not a folder: give the one that holds the pictures of {path}.")
        told = json.dumps([self.path, self.root, file.size, file.stamp])
        self.identity = hashlib.sha256(told.encode()).hexdigest()

    def rows(self, threads: int) -> Iterator[Row | Unfit]:
        with storage.stream(self.path) as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            yield from in_threads(self._row, lines, threads)

    def address(self, place: str) -> str:
        return storage.join(self.root, place)

    def read(self, place: str) -> bytes:
        try:
            return storage.read(self.address(place))
        except FileNotFoundError:
            raise decode.Broken("missing file") from None
        except PermissionError:
            raise decode.Broken("unreadable file") from None

    def _row(self, numbered: tuple[int, bytes]) -> Row | Unfit:
        number, line = numbered
        try:
            entry = entry_of(line)
        except decode.Broken:
            return Unfit(f"line {number}", "bad line")
        name = entry.file if storage.is_remote(entry.file) else posixpath.normpath(entry.file)
        name = unicodedata.normalize("NFC", name)
        try:
            captions, weight = captions_of(entry.said.captions), weight_of(entry.said)
            width, height, content = entry.width, entry.height, ""
            if not (width and height):
                width, height, content = look_at(self.address(entry.file))
            if width * height > decode.LARGEST:
                raise decode.Broken("too large")
        except decode.Broken as broken:
            return Unfit(name, broken.kind)
        return Row(name, entry.file, captions, width, height, entry.said.tags, weight, content)
