"""On-disk index of a dataset: captions, sizes, splits and content hashes.

Reading the captions and headers of millions of images takes minutes to hours. It happens when a
dataset is first used, and again when its listing changes. The index is memory-mapped, so that a
dataset of any size opens at once and many processes share it. Its folder holds five files:

- metadata.bin: a record of fixed size for each image (METADATA_DTYPE);
- records.jsonl: a line of JSON for each image, with name, location, captions and attributes;
- images.bin: the files of images that cannot be read one by one from their source;
- unusable.jsonl: a line of JSON for each image that cannot be used, with name, kind and split hash,
  and with the address and state of the file that failed;
- listing.json: title and identity of the listing, and the version of the decoder.

Files of a list may change without the list. Whenever an index is opened, it compares the state
(size and time) of files whose header it has read, and looks again at files that failed. If there is
a difference, the listing is scanned again into a folder with the next number. The previous folder
remains for processes that are using it. Because requests cost more than reads of a disk, the index
looks at no more than MAX_REMOTE_CHECKS of the remote files that failed.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from radiance.base.errors import DataError
from radiance.data import storage
from radiance.data.addresses import is_remote
from radiance.data.decode import decoder_version
from radiance.data.listing import (
    CHUNK_SIZE,
    IndexRecord,
    Listing,
    UnusableRecord,
    compute_split_hash,
    map_in_threads,
)
from radiance.data.unusable import UnusableError

METADATA_DTYPE = np.dtype(
    [
        ("begin", "<u8"),  # of the line in records.jsonl, in bytes
        ("end", "<u8"),
        ("width", "<u4"),  # pixels, upright
        ("height", "<u4"),
        ("loss_weight", "<f4"),
        ("has_tags", "?"),
        ("file_state", "<u8"),  # hash of the state of the file whose header was read; 0 if none was
        ("split_hash", "<u8"),  # validation if it is below data.validation_fraction · 2⁶⁴
        ("record_hash", "u1", 16),
    ]
)
FORMAT_VERSION = 4  # of the files in an index
MAX_REMOTE_CHECKS = 64
# Reasons that may not exist any more with other versions of the decoder.
DECODER_KINDS = ("not an image", "unsupported format")
PROGRESS_INTERVAL = 10.0  # seconds between messages while an index is built
STALE_AFTER = 3600.0  # seconds without a write after which a partially written index is removed


class DatasetIndex:
    """The records of a listing, in its order.

    The index is built below `cache_dir` on first use. Several processes may build it at once.

    Args:
        listing: Images of the dataset.
        title: Name of the dataset in messages.
        cache_dir: Folder below which indexes are stored.
        num_threads: Number of threads that read files while the index is built.

    Raises:
        DataError: The index cannot be written, or the listing cannot be read.
    """

    def __init__(self, listing: Listing, title: str, cache_dir: Path, num_threads: int):
        self.listing, self.title = listing, title
        index_hash = hashlib.blake2b(
            json.dumps([FORMAT_VERSION, listing.identity]).encode(), digest_size=12
        ).hexdigest()
        base_path = cache_dir / "indexes" / index_hash
        number = _find_newest(base_path)
        self.path = _numbered_path(base_path, number)
        if not self.path.is_dir() or self._is_outdated(num_threads):
            if self.path.is_dir():
                print(f"{title}: files have changed and are scanned again.", file=sys.stderr)
                self.path = _numbered_path(base_path, number + 1)
            for mapped_file in ("metadata", "_record_bytes", "_image_bytes"):
                self.__dict__.pop(mapped_file, None)
            try:
                self._build(base_path, num_threads)
            except DataError:
                raise
            except OSError as error:
                raise DataError(
                    f"The dataset index of {title} cannot be written to {self.path.parent} "
                    f"({error.strerror or error}): free some space there, or set data.cache_dir "
                    "to another folder."
                ) from None
            for older_number in range(number):
                shutil.rmtree(_numbered_path(base_path, older_number), ignore_errors=True)

    @cached_property
    def metadata(self) -> np.ndarray:
        """Records of fixed size of all images, with the fields of METADATA_DTYPE."""
        return _map_file(self.path / "metadata.bin", METADATA_DTYPE)

    @cached_property
    def _record_bytes(self) -> np.ndarray:
        return _map_file(self.path / "records.jsonl", np.uint8)

    @cached_property
    def _image_bytes(self) -> np.ndarray:
        return _map_file(self.path / "images.bin", np.uint8)

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("listing", "title", "path")}

    def __len__(self) -> int:
        return len(self.metadata)

    def read_record(self, index: int) -> IndexRecord:
        """Return the record of an image; its content hash and split hash are left out."""
        metadata = self.metadata[index]
        name, location, captions, attributes = json.loads(
            self._record_bytes[metadata["begin"] : metadata["end"]].tobytes()
        )
        return IndexRecord(
            name,
            location,
            tuple(captions),
            int(metadata["width"]),
            int(metadata["height"]),
            bool(metadata["has_tags"]),
            float(metadata["loss_weight"]),
            attributes=attributes,
        )

    def read_file(self, index: int) -> bytes:
        """Return the content of an image's file.

        Raises:
            UnusableError: The file does not exist.
            DataError: The storage cannot be reached.
        """
        location = self.read_record(index).location
        if not _is_stored(location):
            return self.listing.read_file(location)
        begin, end = location["stored"]
        return self._image_bytes[begin:end].tobytes()

    def address(self, index: int) -> str | None:
        """Return the path or URL of an image's file, or None if it is a part of a larger file."""
        location = self.read_record(index).location
        return None if _is_stored(location) else self.listing.address(location)

    def iter_unusable(self) -> Iterator[tuple[UnusableRecord, int]]:
        """Yield the images that were left out, with their split hashes."""
        with open(self.path / "unusable.jsonl", encoding="utf-8") as lines:
            for line in lines:
                name, kind, split_hash, address, file_state = json.loads(line)
                yield UnusableRecord(name, kind, address, file_state), split_hash

    # --- changes of files ---

    def _is_outdated(self, num_threads: int) -> bool:
        """Return whether a scan would find other images, or the index is damaged."""
        try:
            stored = json.loads((self.path / "listing.json").read_text("utf-8"))
            if stored["file_sizes"] != _file_sizes(self.path):
                return True
            failures = [failure for failure, _ in self.iter_unusable()]
            if stored["decoder"] != decoder_version() and any(
                failure.kind in DECODER_KINDS for failure in failures
            ):
                return True
            if any(map_in_threads(self._has_recovered, _select_checks(failures), num_threads)):
                return True
            with open(self.path / "records.jsonl", "rb") as lines:
                states = self.metadata["file_state"].tolist()
                checks = ((line, state) for line, state in zip(lines, states) if state)
                return any(map_in_threads(self._has_changed, checks, num_threads))
        except (OSError, ValueError, LookupError, TypeError):
            return True

    def _has_recovered(self, failure: UnusableRecord) -> bool:
        """Return whether a file that failed can be read now and has changed since then."""
        file_state = storage.get_file_state(failure.address)
        return bool(file_state) and file_state != failure.file_state

    def _has_changed(self, line_and_state: tuple[bytes, int]) -> bool:
        """Return whether an image's file has changed since its header was read.

        A lost file counts as unchanged: it is reported when the image is loaded.
        """
        line, old_state = line_and_state
        address = self.listing.address(json.loads(line)[1])
        try:
            return bool(address) and _hash_state(storage.get_file_info(address).state) != old_state
        except (OSError, UnusableError):
            return False

    # --- building ---

    def _build(self, base_path: Path, num_threads: int):
        """Write the index to a temporary folder and rename it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_dirs(base_path)
        temp_dir = Path(tempfile.mkdtemp(prefix=f".{base_path.name}.", dir=self.path.parent))
        try:
            self._write_files(temp_dir, num_threads)
            try:
                os.rename(temp_dir, self.path)
            except OSError:
                if not self.path.is_dir():  # another process may have built it meanwhile
                    raise
        finally:
            shutil.rmtree(temp_dir, ignore_errors=True)

    def _write_files(self, directory: Path, num_threads: int):
        """Write all files of the index."""
        num_scanned, last_report = 0, time.monotonic()
        items = self.listing.scan(num_threads)
        with (
            open(directory / "metadata.bin", "wb") as metadata_file,
            open(directory / "records.jsonl", "wb") as records_file,
            open(directory / "unusable.jsonl", "w", encoding="utf-8") as unusable_file,
            open(directory / "images.bin", "wb") as images_file,
        ):
            records, images = _Appender(records_file), _Appender(images_file)
            while chunk := list(islice(items, CHUNK_SIZE)):
                metadata = []
                for item in chunk:
                    if isinstance(item, UnusableRecord):
                        split_hash = compute_split_hash(item.name)
                        fields = [item.name, item.kind, split_hash, item.address, item.file_state]
                        unusable_file.write(json.dumps(fields) + "\n")
                    else:
                        metadata.append(_write_record(item, records, images))
                metadata_file.write(np.array(metadata, METADATA_DTYPE).tobytes())
                num_scanned += len(chunk)
                if time.monotonic() - last_report > PROGRESS_INTERVAL:
                    last_report = time.monotonic()
                    message = f"{self.title}: {num_scanned} images scanned."
                    print(message, file=sys.stderr, flush=True)
        description = {
            "title": self.title,
            "identity": self.listing.identity,
            "decoder": decoder_version(),
            "file_sizes": _file_sizes(directory),
        }
        (directory / "listing.json").write_text(json.dumps(description) + "\n", "utf-8")


def _numbered_path(base_path: Path, number: int) -> Path:
    return base_path.with_name(f"{base_path.name}.{number}") if number else base_path


def _find_newest(base_path: Path) -> int:
    """Return the largest number of an index's folders, or 0."""
    numbers = [path.suffix[1:] for path in base_path.parent.glob(f"{base_path.name}.*")]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _remove_stale_dirs(base_path: Path):
    """Remove what killed processes left of an index."""
    for other_dir in base_path.parent.glob(f".{base_path.name}.*"):
        with suppress(FileNotFoundError):  # its process may have renamed it meanwhile
            last_write = max(file.stat().st_mtime for file in [other_dir, *other_dir.iterdir()])
            if time.time() - last_write > STALE_AFTER:
                shutil.rmtree(other_dir, ignore_errors=True)


def _file_sizes(directory: Path) -> dict[str, int]:
    """Return the sizes of an index's files; a power failure may truncate them."""
    names = ("images.bin", "metadata.bin", "records.jsonl", "unusable.jsonl")
    return {name: (directory / name).stat().st_size for name in names}


def _select_checks(failures: Sequence[UnusableRecord]) -> list[UnusableRecord]:
    """Return the failures to look at again: all of local files, and some of remote ones."""
    local = [failure for failure in failures if failure.address and not is_remote(failure.address)]
    remote = [failure for failure in failures if is_remote(failure.address)]
    return local + remote[:: max(1, math.ceil(len(remote) / MAX_REMOTE_CHECKS))]


def _hash_state(file_state: str) -> int:
    """Return a 64-bit hash of a file's state; 0 if it is not to be compared."""
    digest = hashlib.blake2b(file_state.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") if file_state else 0


class _Appender:
    """Appends byte strings to a new file."""

    def __init__(self, file: BinaryIO):
        self.file, self.size = file, 0

    def append(self, content: bytes) -> tuple[int, int]:
        """Append a string; return its first byte's position and the position after its last."""
        begin = self.size
        self.file.write(content)
        self.size += len(content)
        return begin, self.size


def _write_record(record: IndexRecord, records: _Appender, images: _Appender) -> tuple:
    """Write one image's line, and its file if it has none of its own; return its metadata."""
    location = record.location
    if isinstance(location, bytes):
        location = {"stored": images.append(location)}
    line = json.dumps([record.name, location, record.captions, record.attributes])
    begin, end = records.append(line.encode() + b"\n")
    split_hash = record.split_hash
    return (
        begin,
        end,
        record.width,
        record.height,
        record.loss_weight,
        record.has_tags,
        _hash_state(record.file_state),
        compute_split_hash(record.name) if split_hash is None else split_hash,
        _hash_record(record),
    )


def _is_stored(location: Any) -> bool:
    """Return True if the file of an image is in images.bin."""
    return isinstance(location, dict) and "stored" in location


def _map_file(path: Path, dtype: Any) -> np.ndarray:
    """Map a file into memory; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _hash_record(record: IndexRecord) -> np.ndarray:
    """Hash what training depends on; the location of the file does not count."""
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
