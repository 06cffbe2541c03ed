"""`folder`: pictures with captions as people keep them, read where they lie.

The captions of cat.png stand in cat.txt beside it, one a line, or else in a metadata.jsonl of its folder or of one above, as in
Hugging Face's `imagefolder`: {"file_name": "cat.png", "text": "a cat"}, where "caption" will do for "text", and a list for several.
Subfolders count, links are followed, and names that begin with a dot are passed over.

When a run starts, all captions and the heads of all pictures are read, and what cannot be used is left out and counted by kind.
Pixels are decoded when they are needed: decoding millions of files first would take hours. A picture that turns out broken then is
told once, and the next one is read in its place, every time.
"""

import hashlib
import io
import json
import os
import posixpath
import struct
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from radiance import config
from radiance.data.datasets import DataError, Example

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
OTHER_SUFFIXES = (".avif", ".heic", ".heif", ".jxl", ".tif", ".tiff")
METADATA = "metadata.jsonl"
LARGEST = 89_478_485  # pixels: where Pillow begins to suspect a decompression bomb
ENLARGED = 2  # times, at most, that a picture may be scaled up
EDGE = 4096  # bytes at either end of a file that enter the fingerprint
CHUNK = 256  # files that a thread looks at in one go
LINE_EVERY = 10.0  # seconds
# What Pillow raises for a broken file.
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


class _Unfit(Exception):
    """Why a picture cannot be used: the kind that it is counted under."""


class File(NamedTuple):
    name: str  # within the folder, with "/" and in Unicode NFC: the same on every system
    path: str  # as this system spells it


class Entry(NamedTuple):
    """A picture that can be used."""

    file: File
    captions: tuple[str, ...]
    size: int  # bytes
    digest: str  # of both ends of the file


class Folder:
    """One split of a folder of captioned pictures, ordered by name. May be read from many threads.

    A hash of the name, its suffix left out, says which split a picture belongs to: none ever moves because others come or go, because
    the folder moves, or because it is saved again in another format.

    validation: share of the pictures that is held out.
    side: pictures will be scaled to cover that many pixels; those that this would enlarge more than twice are left out.
    threads: that read heads and captions.

    Raises ConfigError when `path` is not a folder, and DataError when it has nothing for this split.
    """

    def __init__(self, path: str | Path, split: str, *, validation: float, side: int, threads: int):
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise config.ConfigError(f"data.path={path} is not a folder: give one that holds pictures and their captions.")

        def ours(name: str) -> bool:
            return held_out(name, validation) == (split == "validation")

        files, closed = _walk(self.path)
        listed, bad = _read_metadata(file for file in files if posixpath.basename(file.name) == METADATA)
        texts = {file.name: file.path for file in files if file.name.endswith(".txt")}
        pictures = [file for file in files if _suffix(file) in SUFFIXES + OTHER_SUFFIXES or file.name in listed]
        chosen = [file for file in pictures if ours(file.name)]
        seen = _look_at_all(chosen, lambda file: _entry(file, texts, listed, side), threads)

        self.entries = [entry for entry in seen if isinstance(entry, Entry)]
        self.broken: set[int] = set()  # entries that have been found impossible to decode
        self._lock = threading.Lock()
        left_out = defaultdict(list, {"closed folder": list(filter(ours, closed)), f"bad line of {METADATA}": list(filter(ours, bad))})
        left_out["missing file"] = sorted(filter(ours, listed.keys() - {file.name for file in files}))
        for file, unfit in zip(chosen, seen):
            if isinstance(unfit, _Unfit):
                left_out[str(unfit)].append(file.name)
        self.skipped = {kind: len(names) for kind, names in sorted(left_out.items()) if names}

        told = ", ".join(f"{count} × {kind} ({', '.join(map(repr, left_out[kind][:3]))})" for kind, count in self.skipped.items())
        if not self.entries:
            raise DataError(
                f"The {split} split of the folder {self.path} is empty (left out: {told or 'none'}; in the other split: "
                f"{len(pictures) - len(chosen)}): put pictures with captions there, or change data.validation={validation}."
            )
        if told:
            _say(f"{self.path}, {split}: {len(self.entries)} pictures; left out: {told}.")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        """Raises DataError when a file has gone since the start, or when no picture can be decoded."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} pictures, and no number {index}.")
        for i in range(index, index + len(self)):
            picture = self._decode(i % len(self))
            if picture is not None:
                return Example(picture, self.captions(i % len(self)), {})
        raise DataError(f"None of the {len(self)} pictures of {self.path} can be decoded: put whole ones there.")

    def captions(self, index: int) -> tuple[str, ...]:
        return self.entries[index].captions

    def fingerprint(self) -> str:
        """A hash of names, captions and sizes, and of the first and last 4 KB of each file: small files whole, and large ones at
        the price of opening them. Where the folder lies, and the times of its files, do not matter."""
        digest = hashlib.sha256()
        for file, captions, size, edges in self.entries:
            digest.update(json.dumps([file.name, captions, size, edges]).encode() + b"\n")
        return digest.hexdigest()

    def _decode(self, index: int) -> Image.Image | None:
        """None for one that is broken."""
        path = self.entries[index].file.path
        if index in self.broken:
            return None
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path} was there at the start and cannot be read now ({error.strerror}): put it back.") from None
        try:
            return _pixels(content)
        except BROKEN as error:
            with self._lock:
                new = index not in self.broken
                self.broken.add(index)
            if new:
                _say(f"{path!r} cannot be decoded ({error}): the next picture is read in its place. So far {len(self.broken)} were broken.")
            return None


def held_out(name: str, share: float) -> bool:
    """Whether that picture belongs to the validation split."""
    stem = posixpath.splitext(name)[0].encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(stem, digest_size=8).digest(), "little") < share * 2**64


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


def _read_metadata(files: Iterable[File]) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by the name of the picture, and the places of lines that give none."""
    listed: dict[str, list[str]] = {}
    bad = []
    for file in files:
        for number, line in enumerate(Path(file.path).read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name = posixpath.normpath(posixpath.join(posixpath.dirname(file.name), row["file_name"]))
                texts = _texts(row.get("text") or row.get("caption"))
            except (ValueError, TypeError, LookupError, RecursionError):
                bad.append(f"{file.name}:{number}")
            else:
                listed.setdefault(unicodedata.normalize("NFC", name), []).extend(texts)
    return listed, bad


def _texts(value: Any) -> list[str]:
    """Of a text, a list of texts, or none. Raises TypeError for anything else."""
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{value!r} is no caption")
    return texts


def _look_at_all(files: Sequence[File], look: Callable[[File], Entry], threads: int) -> list[Entry | _Unfit]:
    """`look` at each file, in threads, with a line now and then when it takes long."""

    def look_at(chunk: Sequence[File]) -> list[Entry | _Unfit]:
        seen = []
        for file in chunk:
            try:
                seen.append(look(file))
            except _Unfit as unfit:
                seen.append(unfit)
        return seen

    seen: list[Entry | _Unfit] = []
    told = time.monotonic()
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # of Pillow's, about what is counted here
        for some in pool.map(look_at, [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]):
            seen += some
            if time.monotonic() - told > LINE_EVERY:
                told = time.monotonic()
                _say(f"Looked at {len(seen)} of {len(files)} pictures.")
    return seen


def _entry(file: File, texts: Mapping[str, str], listed: Mapping[str, Sequence[str]], side: int) -> Entry:
    """What a run needs to know of a picture. Raises _Unfit when it cannot be used."""
    if _suffix(file) in OTHER_SUFFIXES:
        raise _Unfit("format that is not read")
    try:
        captions = _captions(file, texts, listed)
        with open(file.path, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(0)
            edges = opened.read(EDGE)
            opened.seek(max(size - EDGE, EDGE))
            edges += opened.read(EDGE)
            opened.seek(0)
            _check_head(opened, side)
    except OSError:
        raise _Unfit("unreadable file") from None
    return Entry(file, captions, size, hashlib.blake2b(edges, digest_size=16).hexdigest())


def _captions(file: File, texts: Mapping[str, str], listed: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Of the file beside it, or else of metadata.jsonl."""
    beside = texts.get(posixpath.splitext(file.name)[0] + ".txt")
    if beside is None and file.name not in listed:
        raise _Unfit("no caption")
    try:
        lines = listed[file.name] if beside is None else Path(beside).read_bytes().decode("utf-8-sig").splitlines()
        "".join(lines).encode()
    except UnicodeError:
        raise _Unfit("caption not in UTF-8") from None
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise _Unfit("empty caption")
    return captions


def _check_head(opened: BinaryIO, side: int):
    """Raises _Unfit for what a picture's head tells, without decoding it."""
    try:
        picture = Image.open(opened, formats=FORMATS)
        # An MPO is a photograph, with its depth or preview behind it.
        animated = picture.format != "MPO" and getattr(picture, "is_animated", False)
    except Image.DecompressionBombError:
        raise _Unfit("too large") from None
    except BROKEN:
        raise _Unfit("not a picture") from None
    if picture.width * picture.height > LARGEST:
        raise _Unfit("too large")
    if animated:
        raise _Unfit("animated")
    if ENLARGED * min(picture.size) < side:
        raise _Unfit("too small")


def _pixels(content: bytes) -> Image.Image:
    """The decoded picture, upright, and nothing else of the file. Raises one of BROKEN when it is not whole."""
    picture = Image.open(io.BytesIO(content), formats=FORMATS)
    picture.load()
    try:
        picture = ImageOps.exif_transpose(picture)
    except BROKEN:  # an orientation that cannot be read is none
        picture = picture.copy()
    picture.info = {key: value for key, value in picture.info.items() if key == "transparency"}
    if picture.mode.startswith("I;16"):  # Pillow cuts such greys to 8 bits where it should scale them
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture


def _suffix(file: File) -> str:
    return posixpath.splitext(file.name)[1].lower()


def _say(line: str):
    print(line, file=sys.stderr, flush=True)
