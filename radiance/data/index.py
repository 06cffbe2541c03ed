"""What is known of a data set before a pixel is decoded, on disk: listed once, opened at once, and too large for no memory.

Looking at the captions and the heads of millions of images takes from minutes to hours. It is done when a data set is first
used, and again when its listing changes. Of every image a row of fixed size is kept in facts.bin, and a line of JSON in
rows.jsonl; both are read where they lie (memory-mapped), by as many processes as want them. Images that cannot be found one by
one where they come from are copied to images.bin.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from radiance.base.errors import DataError
from radiance.data.listing import (
    CHUNK_SIZE,
    IndexRecord,
    Listing,
    Unusable,
    compute_split_hash,
)

METADATA_DTYPE = np.dtype(
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
FORMAT_VERSION = 2  # of what is written here
PROGRESS_INTERVAL = 10.0  # seconds
STALE_AFTER = 3600.0  # seconds after which a dataset index that nobody goes on writing is removed

# One whose images are files by themselves also says where they are: `address(place: Any) -> str`, a path or a URL.


class DatasetIndex:
    """The rows of a listing. Images are numbered in the listing's order.

    Made under `directory` on first use, while others may do the same. Raises DataError when the disk is full.
    """

    def __init__(self, listing: Listing, title: str, cache_dir: Path, num_threads: int):
        self.listing, self.title = listing, title
        index_hash = hashlib.blake2b(
            json.dumps([FORMAT_VERSION, listing.identity]).encode(), digest_size=12
        ).hexdigest()
        self.path = cache_dir / "dataset indexes" / index_hash
        if not self.path.is_dir():
            try:
                self._build(num_threads)
            except DataError:
                raise
            except OSError as error:
                raise DataError(
                    f"The dataset index of {title} cannot be written to {self.path.parent} ({error.strerror or error}): make room there, or "
                    "set data.cache_dir to another folder."
                ) from None

    @cached_property
    def metadata(self) -> np.ndarray:
        return _map_file(self.path / "facts.bin", METADATA_DTYPE)

    @cached_property
    def _record_bytes(self) -> np.ndarray:
        return _map_file(self.path / "rows.jsonl", np.uint8)

    @cached_property
    def _image_bytes(self) -> np.ndarray:
        return _map_file(self.path / "images.bin", np.uint8)

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("listing", "title", "path")}

    def __len__(self) -> int:
        return len(self.metadata)

    def read_record(self, index: int) -> IndexRecord:
        entry = self.metadata[index]
        name, location, captions, attributes = json.loads(
            self._record_bytes[entry["begin"] : entry["end"]].tobytes()
        )
        return IndexRecord(
            name,
            location,
            tuple(captions),
            int(entry["width"]),
            int(entry["height"]),
            bool(entry["tags"]),
            float(entry["weight"]),
            "",
            attributes,
        )

    def read_file(self, index: int) -> bytes:
        """The file of an image. Raises what `Listing.read` raises."""
        location = self.read_record(index).location
        if not isinstance(location, dict) or "kept" not in location:
            return self.listing.read_file(location)
        begin, end = location["kept"]
        return self._image_bytes[begin:end].tobytes()

    def address(self, index: int) -> str | None:
        """Where the file of an image is; None where it is a part of one."""
        location = self.read_record(index).location
        is_stored = isinstance(location, dict) and "kept" in location
        return (
            self.listing.address(location)
            if hasattr(self.listing, "address") and not is_stored
            else None
        )

    def iter_unusable(self) -> Iterator[tuple[Unusable, int]]:
        """What was left out, and its lot."""
        with open(self.path / "unfit.jsonl", encoding="utf-8") as lines:
            for line in lines:
                name, kind, split_hash = json.loads(line)
                yield Unusable(name, kind), split_hash

    def _build(self, num_threads: int):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for other_dir in self.path.parent.glob(f".{self.path.name}.*"):
            with suppress(FileNotFoundError):  # it has its name by now
                if (
                    time.time()
                    - max(file.stat().st_mtime for file in [other_dir, *other_dir.iterdir()])
                    > STALE_AFTER
                ):
                    shutil.rmtree(other_dir, ignore_errors=True)  # its process was killed
        temp_dir = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        try:
            self._write_files(temp_dir, num_threads)
            try:
                os.rename(temp_dir, self.path)
            except OSError:
                if not self.path.is_dir():  # made by another process meanwhile
                    raise
        finally:
            shutil.rmtree(temp_dir, ignore_errors=True)

    def _write_files(self, directory: Path, num_threads: int):
        num_scanned, last_report = 0, time.monotonic()
        items = self.listing.scan(num_threads)
        with (
            open(directory / "facts.bin", "wb") as metadata_file,
            open(directory / "rows.jsonl", "wb") as records_file,
            open(directory / "unfit.jsonl", "w", encoding="utf-8") as unusable_file,
            open(directory / "images.bin", "wb") as images_file,
        ):
            while chunk := list(islice(items, CHUNK_SIZE)):
                metadata = np.zeros(len(chunk), METADATA_DTYPE)
                num_records = 0
                for item in chunk:
                    if isinstance(item, Unusable):
                        unusable_file.write(
                            json.dumps([item.name, item.kind, compute_split_hash(item.name)]) + "\n"
                        )
                        continue
                    location = item.location
                    if isinstance(location, bytes):
                        location = {
                            "kept": [images_file.tell(), images_file.tell() + len(location)]
                        }
                        images_file.write(item.location)
                    begin = records_file.tell()
                    records_file.write(
                        json.dumps([item.name, location, item.captions, item.attributes]).encode()
                        + b"\n"
                    )
                    split_hash = (
                        compute_split_hash(item.name)
                        if item.split_hash is None
                        else item.split_hash
                    )
                    metadata[num_records] = (
                        begin,
                        records_file.tell(),
                        item.width,
                        item.height,
                        item.loss_weight,
                        item.has_tags,
                        split_hash,
                        _hash_record(item),
                    )
                    num_records += 1
                metadata_file.write(metadata[:num_records].tobytes())
                num_scanned += len(chunk)
                if time.monotonic() - last_report > PROGRESS_INTERVAL:
                    last_report = time.monotonic()
                    print(
                        f"{self.title}: looked at {num_scanned} images.",
                        file=sys.stderr,
                        flush=True,
                    )
        (directory / "of.json").write_text(
            json.dumps({"title": self.title, "identity": self.listing.identity}) + "\n"
        )


def _map_file(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _hash_record(record: IndexRecord) -> np.ndarray:
    content = json.dumps(
        [
            record.name,
            record.captions,
            record.has_tags,
            record.loss_weight,
            record.width,
            record.height,
            record.content_hash,
        ]
    )
    return np.frombuffer(hashlib.blake2b(content.encode(), digest_size=16).digest(), np.uint8)
