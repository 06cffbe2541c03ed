"""The interface of dataset listings: one record for each image, without decoding pixels."""

import hashlib
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar, runtime_checkable

from radiance.data.decode import MAX_FILE_BYTES, read_image_size
from radiance.data.unusable import UnusableError

TRAIN_HASH = 2**64 - 1  # the split hash of an image that its dataset puts into the training split
CHUNK_SIZE = 256  # images that a thread processes at once
EDGE_BYTES = 4096  # bytes at either end of a file that enter the content hash

Item = TypeVar("Item")
Output = TypeVar("Output")


class IndexRecord(NamedTuple):
    """An image that can be used.

    Attributes:
        name: Name of the image within its dataset. It decides the split if `split_hash` is None.
        location: JSON value with which `Listing.read_file` finds the image. A listing whose images
            cannot be read one by one gives the bytes of the file instead.
        captions: At least one caption.
        width: Width of the upright image in pixels.
        height: Height of the upright image in pixels.
        has_tags: True if the captions are comma-separated lists of tags.
        loss_weight: Weight of the image's loss.
        content_hash: Hash of the file, or of the part of it that was read.
        attributes: Known contents of the image, as a JSON object.
        split_hash: 0 for validation, TRAIN_HASH for training, another hash to decide by it, None
            to decide by name.
        file_state: State of the image's file when its header was read (`storage.get_file_state`).
            Empty if the identity of the listing depends on it, or if the header was not read.
    """

    name: str
    location: Any
    captions: tuple[str, ...]
    width: int
    height: int
    has_tags: bool = False
    loss_weight: float = 1.0
    content_hash: str = ""
    attributes: dict[str, Any] = {}  # noqa: RUF012 (it is never changed)
    split_hash: int | None = None
    file_state: str = ""


class UnusableRecord(NamedTuple):
    """An image, or a line of a file, that cannot be used.

    Attributes:
        name: Name of the image, or the location of the line.
        kind: Reason under which it is counted.
        address: Path or URL of the file that failed, if it may become usable as it is.
        file_state: State of this file then; empty if it could not be read.
    """

    name: str
    kind: str
    address: str = ""
    file_state: str = ""


@runtime_checkable
class Listing(Protocol):
    """The images of a dataset in a folder, in a file that lists them, or in shards.

    A listing can be pickled. The copy need not support `scan`, only `address` and `read_file`.

    Attributes:
        identity: Hash that changes when `scan` would yield something else.
    """

    identity: str

    def scan(self, num_threads: int) -> Iterator[IndexRecord | UnusableRecord]:
        """Yield all images in a stable order.

        Args:
            num_threads: Number of threads that read files.
        """
        ...

    def address(self, location: Any) -> str | None:
        """Return the path or URL of an image's file, or None if it is a part of a larger file."""
        ...

    def read_file(self, location: Any) -> bytes:
        """Return the content of an image's file.

        Raises:
            UnusableError: The file does not exist.
            DataError: The storage cannot be reached.
        """
        ...


def compute_split_hash(name: str) -> int:
    """Return the 64-bit hash of a name that decides the split of its image.

    The suffix of the name is ignored: an image that is saved again in another format keeps its
    split.
    """
    stem = posixpath.splitext(name)[0].encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(stem, digest_size=8).digest(), "little")


def read_image_header(file: BinaryIO) -> tuple[int, int, str]:
    """Read the size and a content hash of an image without decoding it.

    Args:
        file: Seekable file.

    Returns:
        Width and height of the upright image in pixels, and a hash of the file's size and of
        EDGE_BYTES bytes at either end.

    Raises:
        UnusableError: The file is not an image that can be used; see `read_image_size`.
    """
    size = file.seek(0, os.SEEK_END)
    if size > MAX_FILE_BYTES:
        raise UnusableError("too large", f"{size} bytes")
    file.seek(0)
    edges = file.read(EDGE_BYTES)
    file.seek(max(size - EDGE_BYTES, EDGE_BYTES))
    edges += file.read(EDGE_BYTES)
    file.seek(0)
    width, height = read_image_size(file)
    return width, height, f"{size} {hashlib.blake2b(edges, digest_size=16).hexdigest()}"


def map_in_threads(
    function: Callable[[Item], Output],
    items: Iterable[Item],
    num_threads: int,
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[Output]:
    """Apply a function to each item in threads, at most two chunks per thread ahead.

    Args:
        function: Function of one item.
        items: Items, which are consumed lazily.
        num_threads: Number of threads.
        chunk_size: Number of items that a thread processes at once.

    Yields:
        The results, in the order of the items.
    """
    items = iter(items)

    def process_chunk(chunk: Sequence[Item]) -> list[Output]:
        return [function(item) for item in chunk]

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [
            pool.submit(process_chunk, chunk)
            for _ in range(2 * num_threads)
            if (chunk := list(islice(items, chunk_size)))
        ]
        while futures:
            yield from futures.pop(0).result()
            if chunk := list(islice(items, chunk_size)):
                futures.append(pool.submit(process_chunk, chunk))
