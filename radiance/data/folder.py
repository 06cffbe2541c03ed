"""`folder`: pictures with captions as people keep them, read where they lie.

The captions of cat.png stand in cat.txt beside it, one a line, or else in a metadata.jsonl of its folder or of one above, as in
Hugging Face's `imagefolder`: {"file_name": "cat.png", "text": "a cat"}, where "caption" will do for "text", and a list for several;
"is_tag_based": true says that they are tags with commas between.
Subfolders count, links are followed, and names that begin with a dot are passed over.

When a run starts, all captions and the heads of all pictures are read, and what cannot be used is left out and counted by kind.
Pixels are decoded when they are needed (data/decode.py): decoding millions of files first would take hours. A picture that turns out
broken then is told once and passed over, every time.
"""

import hashlib
import json
import os
import posixpath
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from radiance import config
from radiance.data import decode
from radiance.data.catalogue import DataError, Row, Unfit, in_threads

SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in decode.EXCLUDED)
OTHER_SUFFIXES = (".heic", ".heif", ".jxl")  # pictures to people, but not to Pillow without its plugins
METADATA = "metadata.jsonl"
EDGE = 4096  # bytes at either end of a file that enter the fingerprint


class File(NamedTuple):
    name: str  # within the folder, with "/" and in Unicode NFC: the same on every system
    path: str  # as this system spells it


class Folder:
    """A folder of captioned pictures, ordered by name.

    Raises ConfigError when the path is not a folder.
    """

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise config.ConfigError(f"data.path={path} is not a folder: give one that holds pictures and their captions.")
        self.files, self.closed = _walk(self.path)
        digest = hashlib.sha256(str(self.path.resolve()).encode(errors="surrogatepass"))
        for file in self.files:
            try:
                status = os.stat(file.path)
                told = [file.name, status.st_size, status.st_mtime_ns]
            except OSError:
                told = [file.name]
            digest.update(json.dumps(told).encode())
        digest.update(json.dumps(self.closed).encode())
        self.identity = digest.hexdigest()

    def __getstate__(self):
        return {"path": self.path}  # what reads pictures needs no more

    def rows(self, threads: int) -> Iterator[Row | Unfit]:
        listed, tagged, bad = _read_metadata(file for file in self.files if posixpath.basename(file.name) == METADATA)
        texts = {file.name: file.path for file in self.files if file.name.endswith(".txt")}
        pictures = [file for file in self.files if _suffix(file) in SUFFIXES.union(OTHER_SUFFIXES) or file.name in listed]
        yield from (Unfit(name, "closed folder") for name in self.closed)
        yield from (Unfit(place, f"bad line of {METADATA}") for place in bad)
        yield from (Unfit(name, "missing file") for name in sorted(listed.keys() - {file.name for file in self.files}))
        yield from in_threads(partial(_row, root=str(self.path), texts=texts, listed=listed, tagged=tagged), pictures, threads)

    def address(self, place: str) -> str:
        return os.path.join(self.path, place)

    def read(self, place: str) -> bytes:
        path = self.address(place)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path} was there at the start and cannot be read now ({error.strerror}): put it back.") from None


def _walk(root: Path) -> tuple[list[File], list[str]]:
    """Files by name, and the names of folders that cannot be listed. A folder that is met again through a link is passed over."""
    files, closed, met = [], [], set()

    def name_of(path: str) -> str:
        return unicodedata.normalize("NFC", Path(path).relative_to(root).as_posix())

    def note(error: OSError):
        closed.append(name_of(error.filename))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=note):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in met:
            folders.clear()
            continue
        met.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = "" if folder == str(root) else name_of(folder)
        for name in names:
            if not name.startswith("."):
                files.append(File(posixpath.join(inside, unicodedata.normalize("NFC", name)), os.path.join(folder, name)))
    return sorted(files), closed


def _read_metadata(files: Iterable[File]) -> tuple[dict[str, list[str]], set[str], list[str]]:
    """Captions by the name of the picture, the pictures whose captions are tags, and the places of lines that give none."""
    listed: dict[str, list[str]] = {}
    tagged, bad = set(), []
    for file in files:
        for number, line in enumerate(Path(file.path).read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = posixpath.normpath(posixpath.join(posixpath.dirname(file.name), row["file_name"]))
                texts = _texts(row.get("text") or row.get("caption"))
                tags = bool(row.get("is_tag_based"))
            except (ValueError, TypeError, LookupError, RecursionError):
                bad.append(f"{file.name}:{number}")
            else:
                name = unicodedata.normalize("NFC", name)
                listed.setdefault(name, []).extend(texts)
                if tags:
                    tagged.add(name)
    return listed, tagged, bad


def _texts(value: Any) -> list[str]:
    """Of a text, a list of texts, or none. Raises TypeError for anything else."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{value!r} is no caption")
    return texts


def _row(file: File, root: str, texts: Mapping[str, str], listed: Mapping[str, Sequence[str]], tagged: Container[str]) -> Row | Unfit:
    """What a run needs to know of a picture."""
    if _suffix(file) not in SUFFIXES and _suffix(file) in OTHER_SUFFIXES:
        return Unfit(file.name, "format that is not read")
    captions = _captions(file, texts, listed)
    if isinstance(captions, Unfit):
        return captions
    try:
        with open(file.path, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(0)
            edges = opened.read(EDGE)
            opened.seek(max(size - EDGE, EDGE))
            edges += opened.read(EDGE)
            opened.seek(0)
            width, height = decode.size_of(opened)
    except decode.Broken as broken:
        return Unfit(file.name, broken.kind)
    except OSError:
        return Unfit(file.name, "unreadable file")
    content = f"{size} {hashlib.blake2b(edges, digest_size=16).hexdigest()}"
    return Row(file.name, os.path.relpath(file.path, root), captions, width, height, tags=file.name in tagged, content=content)


def _captions(file: File, texts: Mapping[str, str], listed: Mapping[str, Sequence[str]]) -> tuple[str, ...] | Unfit:
    """Of the file beside it, or else of metadata.jsonl."""
    beside = texts.get(posixpath.splitext(file.name)[0] + ".txt")
    if beside is None and file.name not in listed:
        return Unfit(file.name, "no caption")
    try:
        lines = listed[file.name] if beside is None else Path(beside).read_bytes().decode("utf-8-sig").splitlines()
        "".join(lines).encode()
    except UnicodeError:
        return Unfit(file.name, "caption not in UTF-8")
    except OSError:
        return Unfit(file.name, "unreadable file")
    captions = tuple(line.strip() for line in lines if line.strip())
    return captions or Unfit(file.name, "empty caption")


def _suffix(file: File) -> str:
    return posixpath.splitext(file.name)[1].lower()
