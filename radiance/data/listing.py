"""The interface of dataset listings: one record for each image, without decoding pixels."""

import hashlib
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from radiance.data.decode import read_image_size

TRAIN_HASH = 2**64 - 1  # the lot of an image that its data set puts into the training split


CHUNK_SIZE = 256  # images that a thread looks at in one go


EDGE_BYTES = 4096  # bytes at either end of a file that enter the fingerprint


class IndexRecord(NamedTuple):
    """An image that can be used."""

    name: str  # of the image within its data set; says which split it belongs to, unless `lot` does
    location: Any  # where `Listing.read` finds it: JSON; the whole file, as bytes, where it could not find it
    captions: tuple[str, ...]  # at least one
    width: int  # pixels, upright
    height: int
    has_tags: bool = False  # whether the captions are lists of tags with commas between
    loss_weight: float = 1.0  # of its loss
    content_hash: str = ""  # a digest of the file, or of as much of it as was read
    attributes: dict[str, Any] = {}  # what is known to be in the image: JSON
    split_hash: int | None = None  # 0: validation; TRAIN: training


class Unusable(NamedTuple):
    """An image, or a line, that cannot be used."""

    name: str
    kind: str  # what it is counted under


class Listing(Protocol):
    """A data set as it lies somewhere: a folder, a file that lists images, shards. Can be pickled."""

    identity: str  # changes when there is other to be listed

    def scan(self, num_threads: int) -> Iterator[IndexRecord | Unusable]:
        """All of it, in an order that does not change by itself."""

    def read_file(self, location: Any) -> bytes:
        """The file of an image. Raises Broken when it is not there, and DataError when it cannot be reached."""


def compute_split_hash(name: str) -> int:
    """Decides which split an image belongs to. The suffix does not count: one that is saved again in another format stays where it was."""
    stem = posixpath.splitext(name)[0].encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(stem, digest_size=8).digest(), "little")


def read_image_header(file: BinaryIO) -> tuple[int, int, str]:
    """Of an image: width and height, upright, and a digest of its size and of its bytes at either end. Raises what `size_of` does."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    edges = file.read(EDGE_BYTES)
    file.seek(max(size - EDGE_BYTES, EDGE_BYTES))
    edges += file.read(EDGE_BYTES)
    file.seek(0)
    width, height = read_image_size(file)
    return width, height, f"{size} {hashlib.blake2b(edges, digest_size=16).hexdigest()}"


Item = TypeVar("Item")


Output = TypeVar("Output")


def map_in_threads(
    function: Callable[[Item], Output],
    items: Iterable[Item],
    num_threads: int,
    chunk_size: int = CHUNK_SIZE,
) -> Iterator[Output]:
    """`look` at each item, in threads; the results in the order of the items, and no more than a few chunks ahead."""
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
