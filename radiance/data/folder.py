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
import sys
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from radiance import config
from radiance.data import decode
from radiance.data.datasets import DataError, Example

SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name not in decode.EXCLUDED)
OTHER_SUFFIXES = (".heic", ".heif", ".jxl")  # pictures to people, but not to Pillow without its plugins
METADATA = "metadata.jsonl"
ENLARGED = 2  # times, at most, that a picture may be scaled up
EDGE = 4096  # bytes at either end of a file that enter the fingerprint
CHUNK = 256  # files that a thread looks at in one go
LINE_EVERY = 10.0  # seconds


class _Unfit(Exception):
    """Why a picture cannot be used: the kind that it is counted under."""


class File(NamedTuple):
    name: str  # within the folder, with "/" and in Unicode NFC: the same on every system
    path: str  # as this system spells it


class Entry(NamedTuple):
    """A picture that can be used."""

    file: File
    captions: tuple[str, ...]
    tags: bool  # whether the captions are lists of tags
    size: int  # bytes
    digest: str  # of both ends of the file


class Folder:
    """One split of a folder of captioned pictures, ordered by name. May be read from many threads.

    A hash of the name, its suffix left out, says which split a picture belongs to: none ever moves because others come or go, because
    the folder moves, or because it is saved again in another format.

    Of the settings it reads path, validation, side (pictures that covering it would enlarge more than twice are left out), background, threads (that
    read heads and captions) and broken_limit.

    Raises ConfigError when the path is not a folder, and DataError when it has nothing for this split.
    """

    def __init__(self, data: config.Data, split: str):
        self.data, self.path = data, Path(data.path).expanduser()
        if not self.path.is_dir():
            raise config.ConfigError(f"data.path={data.path} is not a folder: give one that holds pictures and their captions.")

        def ours(name: str) -> bool:
            return held_out(name, data.validation) == (split == "validation")

        files, closed = _walk(self.path)
        listed, tagged, bad = _read_metadata(file for file in files if posixpath.basename(file.name) == METADATA)
        texts = {file.name: file.path for file in files if file.name.endswith(".txt")}
        pictures = [file for file in files if _suffix(file) in SUFFIXES.union(OTHER_SUFFIXES) or file.name in listed]
        chosen = [file for file in pictures if ours(file.name)]
        seen = _look_at_all(chosen, lambda file: _entry(file, texts, listed, tagged, data.side), data.threads)

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
                f"{len(pictures) - len(chosen)}): put pictures with captions there, or change data.validation={data.validation}."
            )
        if told:
            _say(f"{self.path}, {split}: {len(self.entries)} pictures; left out: {told}.")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        """Raises Broken for a picture that cannot be decoded, and DataError when too many cannot, or when a file has gone since the start."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} pictures, and no number {index}.")
        path = self.entries[index].file.path
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path} was there at the start and cannot be read now ({error.strerror}): put it back.") from None
        try:
            return Example(decode.picture(content, (self.data.side, self.data.side), self.data.background), self.captions(index), {})
        except decode.Broken as broken:
            self._note(index, broken)
            raise

    def captions(self, index: int) -> tuple[str, ...]:
        return self.entries[index].captions

    def tags(self, index: int) -> bool:
        return self.entries[index].tags

    def fingerprint(self) -> str:
        """A hash of names, captions and sizes, and of the first and last 4 KB of each file: small files whole, and large ones at
        the price of opening them. Where the folder lies, and the times of its files, do not matter."""
        digest = hashlib.sha256()
        for file, captions, tags, size, edges in self.entries:
            digest.update(json.dumps([file.name, captions, tags, size, edges]).encode() + b"\n")
        return digest.hexdigest()

    def _note(self, index: int, broken: decode.Broken):
        """Tells of a broken picture, once. Raises DataError when there are too many."""
        with self._lock:
            new = index not in self.broken
            self.broken.add(index)
        count = len(self.broken)
        if new:
            _say(f"{self.entries[index].file.path!r} cannot be used ({broken}) and is passed over. So far {count} were broken.")
        if count > self.data.broken_limit * len(self):
            raise DataError(
                f"{count} of the {len(self)} pictures of {self.path} cannot be decoded, which is more than data.broken_limit={self.data.broken_limit}: "
                "put whole ones there, or raise it."
            )


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
    with ThreadPoolExecutor(threads) as pool:
        for some in pool.map(look_at, [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]):
            seen += some
            if time.monotonic() - told > LINE_EVERY:
                told = time.monotonic()
                _say(f"Looked at {len(seen)} of {len(files)} pictures.")
    return seen


def _entry(file: File, texts: Mapping[str, str], listed: Mapping[str, Sequence[str]], tagged: Container[str], side: int) -> Entry:
    """What a run needs to know of a picture. Raises _Unfit when it cannot be used."""
    if _suffix(file) not in SUFFIXES and _suffix(file) in OTHER_SUFFIXES:
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
            width, height = decode.size_of(opened)
    except decode.Broken as broken:
        raise _Unfit(broken.kind) from None
    except OSError:
        raise _Unfit("unreadable file") from None
    if ENLARGED * min(width, height) < side:
        raise _Unfit("too small")
    return Entry(file, captions, file.name in tagged, size, hashlib.blake2b(edges, digest_size=16).hexdigest())


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


def _suffix(file: File) -> str:
    return posixpath.splitext(file.name)[1].lower()


def _say(line: str):
    print(line, file=sys.stderr, flush=True)
