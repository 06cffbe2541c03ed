"""`folder`: pictures with captions as people keep them, read where they lie: on a disk, or anywhere fsspec reaches.

The captions of cat.png stand in cat.txt beside it, one a line, or else in a metadata.jsonl of its folder or of one above, as in
Hugging Face's `imagefolder`: {"file_name": "cat.png", "text": "a cat"}, where "caption" will do for "text", and a list for several;
"is_tag_based": true says that they are tags with commas between, and "loss_weight": 2 that the picture counts twice.
Subfolders count, links are followed, and names that begin with a dot are passed over.

When a run starts, all captions and the heads of all pictures are read, and what cannot be used is left out and counted by kind.
Pixels are decoded when they are needed (data/decode.py): decoding millions of files first would take hours. A picture that turns out
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
from radiance.data import decode, storage
from radiance.data.catalogue import DataError, Row, Unfit, in_threads
from radiance.data.records import Said, captions_of, entry_of, lines, look_at, weight_of
from radiance.data.storage import File

SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in decode.EXCLUDED)
OTHER_SUFFIXES = (".heic", ".heif", ".jxl")  # pictures to people, but not to Pillow without its plugins
METADATA = "metadata.jsonl"


class Folder:
    """A folder of captioned pictures, ordered by name.

    Raises ConfigError when the path is not a folder.
    """

    def __init__(self, path: str):
        self.path = storage.absolute(path)
        try:
            self.files, self.closed = storage.files(self.path)
        except NotADirectoryError:
            raise config.ConfigError(f"data.path={path} is not a folder: give one that holds pictures and their captions.") from None
        digest = hashlib.sha256(self.path.encode(errors="surrogatepass"))
        for file in self.files:
            digest.update(json.dumps([file.name, file.size, file.stamp]).encode())
        digest.update(json.dumps(self.closed).encode())
        self.identity = digest.hexdigest()

    def __getstate__(self):
        return {"path": self.path}  # what reads pictures needs no more

    def rows(self, threads: int) -> Iterator[Row | Unfit]:
        listed, bad = self._metadata()
        texts = {file.name: file.place for file in self.files if file.name.endswith(".txt")}
        pictures = [file for file in self.files if _suffix(file) in SUFFIXES.union(OTHER_SUFFIXES) or file.name in listed]
        yield from (Unfit(name, "closed folder") for name in self.closed)
        yield from (Unfit(place, f"bad line of {METADATA}") for place in bad)
        yield from (Unfit(name, "missing file") for name in sorted(listed.keys() - {file.name for file in self.files}))
        yield from in_threads(partial(self._row, texts=texts, listed=listed), pictures, threads)

    def address(self, place: str) -> str:
        return storage.join(self.path, place)

    def read(self, place: str) -> bytes:
        address = self.address(place)
        try:
            return storage.read(address)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"{address} was there at the start and cannot be read now ({error.strerror}): put it back.") from None

    def _metadata(self) -> tuple[dict[str, Said], list[str]]:
        """What is said of pictures, by their names, and the places of lines that say nothing."""
        listed: dict[str, Said] = {}
        bad = []
        for file in self.files:
            if posixpath.basename(file.name) != METADATA:
                continue
            for number, line in enumerate(self.read(file.place).split(b"\n"), 1):
                if not line.strip():
                    continue
                try:
                    entry = entry_of(line)
                except decode.Broken:
                    bad.append(f"{file.name}:{number}")
                else:
                    name = posixpath.normpath(posixpath.join(posixpath.dirname(file.name), entry.file))
                    name = unicodedata.normalize("NFC", name)
                    before = listed[name].captions if name in listed else ()
                    listed[name] = entry.said._replace(captions=(*before, *entry.said.captions))
        return listed, bad

    def _row(self, file: File, texts: Mapping[str, str], listed: Mapping[str, Said]) -> Row | Unfit:
        """What a run needs to know of a picture."""
        if _suffix(file) not in SUFFIXES and _suffix(file) in OTHER_SUFFIXES:
            return Unfit(file.name, "format that is not read")
        beside, told = texts.get(posixpath.splitext(file.name)[0] + ".txt"), listed.get(file.name)
        if beside is None and told is None:
            return Unfit(file.name, "no caption")
        told = told or Said()
        try:
            captions, weight = captions_of(told.captions if beside is None else self._beside(beside)), weight_of(told)
            width, height, content = look_at(self.address(file.place), file.size)
        except decode.Broken as broken:
            return Unfit(file.name, broken.kind)
        return Row(file.name, file.place, captions, width, height, told.tags, weight, content)

    def _beside(self, place: str) -> list[str]:
        """The lines of the file of captions. Raises Broken when it cannot be read."""
        try:
            return lines(storage.read(self.address(place)))
        except (FileNotFoundError, PermissionError):
            raise decode.Broken("unreadable file") from None


def _suffix(file: File) -> str:
    return posixpath.splitext(file.name)[1].lower()
