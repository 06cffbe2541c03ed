"""What is known of a data set before a pixel is decoded, on disk: listed once, opened at once, and too large for no memory.

Looking at the captions and the heads of millions of pictures takes from minutes to hours. It is done when a data set is first
used, and again when its listing changes. Of every picture a row of fixed size is kept in facts.bin, and a line of JSON in
rows.jsonl; both are read where they lie (memory-mapped), by as many processes as want them. Pictures that cannot be found one by
one where they come from are copied to pictures.bin.
"""

import hashlib
import json
import os
import posixpath
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np

from radiance.data.decode import size_of

FACTS = np.dtype(
    [
        ("begin", "<u8"),  # of its line in rows.jsonl
        ("end", "<u8"),
        ("width", "<u4"),  # pixels, upright
        ("height", "<u4"),
        ("weight", "<f4"),
        ("tags", "?"),
        ("lot", "<u8"),  # from 0 to 2⁶⁴ - 1: held out when it is below that share
        ("digest", "u1", 16),
    ]
)
FORMAT = 2  # of what is written here
TRAIN = 2**64 - 1  # the lot of a picture that its data set puts into the training split
CHUNK = 256  # pictures that a thread looks at in one go
EDGE = 4096  # bytes at either end of a file that enter the fingerprint
LINE_EVERY = 10.0  # seconds
ABANDONED = 3600.0  # seconds after which a catalogue that nobody goes on writing is removed


class DataError(ValueError):
    """Data that cannot be used; the message says what is wrong and what to do."""


class Row(NamedTuple):
    """A picture that can be used."""

    name: str  # of the picture within its data set; says which split it belongs to, unless `lot` does
    place: Any  # where `Listing.read` finds it: JSON; the whole file, as bytes, where it could not find it
    captions: tuple[str, ...]  # at least one
    width: int  # pixels, upright
    height: int
    tags: bool = False  # whether the captions are lists of tags with commas between
    weight: float = 1.0  # of its loss
    content: str = ""  # a digest of the file, or of as much of it as was read
    attributes: dict[str, Any] = {}  # what is known to be in the picture: JSON
    lot: int | None = None  # 0: validation; TRAIN: training


class Unfit(NamedTuple):
    """A picture, or a line, that cannot be used."""

    name: str
    kind: str  # what it is counted under


class Listing(Protocol):
    """A data set as it lies somewhere: a folder, a file that lists pictures, shards. Can be pickled."""

    identity: str  # changes when there is other to be listed

    def rows(self, threads: int) -> Iterator[Row | Unfit]:
        """All of it, in an order that does not change by itself."""

    def read(self, place: Any) -> bytes:
        """The file of a picture. Raises Broken when it is not there, and DataError when it cannot be reached."""

    # One whose pictures are files by themselves also says where they are: `address(place: Any) -> str`, a path or a URL.


class Catalogue:
    """The rows of a listing. Pictures are numbered in the listing's order.

    Made under `directory` on first use, while others may do the same. Raises DataError when the disk is full.
    """

    def __init__(self, listing: Listing, title: str, directory: Path, threads: int):
        self.listing, self.title = listing, title
        digest = hashlib.blake2b(json.dumps([FORMAT, listing.identity]).encode(), digest_size=12).hexdigest()
        self.path = directory / "catalogues" / digest
        if not self.path.is_dir():
            try:
                self._make(threads)
            except DataError:
                raise
            except OSError as error:
                raise DataError(
                    f"The catalogue of {title} cannot be written to {self.path.parent} ({error.strerror or error}): make room there, or "
                    "set data.directory to another folder."
                ) from None

    @cached_property
    def facts(self) -> np.ndarray:
        return _mapped(self.path / "facts.bin", FACTS)

    @cached_property
    def _lines(self) -> np.ndarray:
        return _mapped(self.path / "rows.jsonl", np.uint8)

    @cached_property
    def _pictures(self) -> np.ndarray:
        return _mapped(self.path / "pictures.bin", np.uint8)

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("listing", "title", "path")}

    def __len__(self) -> int:
        return len(self.facts)

    def row(self, index: int) -> Row:
        fact = self.facts[index]
        name, place, captions, attributes = json.loads(self._lines[fact["begin"] : fact["end"]].tobytes())
        return Row(
            name, place, tuple(captions), int(fact["width"]), int(fact["height"]), bool(fact["tags"]), float(fact["weight"]), "", attributes
        )

    def read(self, index: int) -> bytes:
        """The file of a picture. Raises what `Listing.read` raises."""
        place = self.row(index).place
        if not isinstance(place, dict) or "kept" not in place:
            return self.listing.read(place)
        begin, end = place["kept"]
        return self._pictures[begin:end].tobytes()

    def address(self, index: int) -> str | None:
        """Where the file of a picture is; None where it is a part of one."""
        place = self.row(index).place
        kept = isinstance(place, dict) and "kept" in place
        return self.listing.address(place) if hasattr(self.listing, "address") and not kept else None

    def unfit(self) -> Iterator[tuple[Unfit, int]]:
        """What was left out, and its lot."""
        with open(self.path / "unfit.jsonl", encoding="utf-8") as lines:
            for line in lines:
                name, kind, lot = json.loads(line)
                yield Unfit(name, kind), lot

    def _make(self, threads: int):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for other in self.path.parent.glob(f".{self.path.name}.*"):
            with suppress(FileNotFoundError):  # it has its name by now
                if time.time() - max(file.stat().st_mtime for file in [other, *other.iterdir()]) > ABANDONED:
                    shutil.rmtree(other, ignore_errors=True)  # its process was killed
        part = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        try:
            self._write(part, threads)
            try:
                os.rename(part, self.path)
            except OSError:
                if not self.path.is_dir():  # made by another process meanwhile
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _write(self, part: Path, threads: int):
        count, told = 0, time.monotonic()
        listed = self.listing.rows(threads)
        with (
            open(part / "facts.bin", "wb") as kept_facts,
            open(part / "rows.jsonl", "wb") as rows,
            open(part / "unfit.jsonl", "w", encoding="utf-8") as unfit,
            open(part / "pictures.bin", "wb") as pictures,
        ):
            while some := list(islice(listed, CHUNK)):
                facts = np.zeros(len(some), FACTS)
                kept = 0
                for item in some:
                    if isinstance(item, Unfit):
                        unfit.write(json.dumps([item.name, item.kind, lot_of(item.name)]) + "\n")
                        continue
                    place = item.place
                    if isinstance(place, bytes):
                        place = {"kept": [pictures.tell(), pictures.tell() + len(place)]}
                        pictures.write(item.place)
                    begin = rows.tell()
                    rows.write(json.dumps([item.name, place, item.captions, item.attributes]).encode() + b"\n")
                    lot = lot_of(item.name) if item.lot is None else item.lot
                    facts[kept] = (begin, rows.tell(), item.width, item.height, item.weight, item.tags, lot, _digest(item))
                    kept += 1
                kept_facts.write(facts[:kept].tobytes())
                count += len(some)
                if time.monotonic() - told > LINE_EVERY:
                    told = time.monotonic()
                    print(f"{self.title}: looked at {count} pictures.", file=sys.stderr, flush=True)
        (part / "of.json").write_text(json.dumps({"title": self.title, "identity": self.listing.identity}) + "\n")


def _mapped(path: Path, kind: Any) -> np.ndarray:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


def lot_of(name: str) -> int:
    """Decides which split a picture belongs to. The suffix does not count: one that is saved again in another format stays where it was."""
    stem = posixpath.splitext(name)[0].encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(stem, digest_size=8).digest(), "little")


def head_of(file: BinaryIO) -> tuple[int, int, str]:
    """Of a picture: width and height, upright, and a digest of its size and of its bytes at either end. Raises what `size_of` does."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    edges = file.read(EDGE)
    file.seek(max(size - EDGE, EDGE))
    edges += file.read(EDGE)
    file.seek(0)
    width, height = size_of(file)
    return width, height, f"{size} {hashlib.blake2b(edges, digest_size=16).hexdigest()}"


def _digest(row: Row) -> np.ndarray:
    told = json.dumps([row.name, row.captions, row.tags, row.weight, row.width, row.height, row.content])
    return np.frombuffer(hashlib.blake2b(told.encode(), digest_size=16).digest(), np.uint8)


Item = TypeVar("Item")
Seen = TypeVar("Seen")


def in_threads(look: Callable[[Item], Seen], items: Iterable[Item], threads: int, chunk: int = CHUNK) -> Iterator[Seen]:
    """`look` at each item, in threads; the results in the order of the items, and no more than a few chunks ahead."""
    items = iter(items)

    def look_at(some: Sequence[Item]) -> list[Seen]:
        return [look(item) for item in some]

    with ThreadPoolExecutor(threads) as pool:
        ahead = [pool.submit(look_at, some) for _ in range(2 * threads) if (some := list(islice(items, chunk)))]
        while ahead:
            yield from ahead.pop(0).result()
            if some := list(islice(items, chunk)):
                ahead.append(pool.submit(look_at, some))
