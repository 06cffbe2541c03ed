"""Near-duplicates: images that were encoded again, resized, or slightly changed in color.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions",
2010). The image's luma is resized to 32 × 32 pixels, and its orthonormal cosine transform (DCT-II)
is computed. Each of the 64 coefficients with frequencies 1 to 8 along both axes gives one bit:
whether it is above their median. Brightness does not affect these coefficients, and contrast scales
all of them alike.

All pairs of different hashes are compared, so the time grows with the square of their number. One
core compares about 3 · 10⁸ pairs per second: 100,000 images take 17 seconds, a million half an hour
and two million two hours. Threads on other cores divide this time. Search larger datasets in parts.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Real, UInt8, UInt64
from PIL import Image

from radiance.data.listing import map_in_threads
from radiance.data.source import Source
from radiance.data.unusable import UnusableError

LUMA_SIZE = 32  # pixels
NUM_FREQUENCIES = 8  # along each axis
# Images whose coefficients have a smaller root mean square (in 8-bit levels) have no hash, because
# noise would decide its bits.
MIN_RMS = 0.25
DEFAULT_DISTANCE = 4  # bits of 64 that may differ
MAX_DISTANCE = 11  # at larger distances, images are no longer similar
# Hashes that are compared at once. The intermediate results fit into the cache of a core.
BLOCK_ROWS, BLOCK_COLUMNS = 64, 4096

Hashes = UInt64[np.ndarray, " n"]
Pairs = Int64[np.ndarray, "pairs 2"]


class ImageHashes(NamedTuple):
    """Hashes of the images of a source."""

    hashes: Hashes
    has_hash: Bool[np.ndarray, " n"]  # False for images of one color, and for broken ones
    errors: Mapping[int, str]  # by index: why images cannot be decoded


class DuplicateGroup(NamedTuple):
    """Near-duplicates of an image. The representative is the largest image of the group."""

    representative: int
    duplicates: tuple[int, ...]


# --- hashes ---------------------------------------------------------------------------------------


def _cosine_basis() -> Float64[np.ndarray, "frequencies side"]:
    """Return the rows 1 to NUM_FREQUENCIES of the orthonormal DCT-II."""
    frequency, position = np.arange(1, NUM_FREQUENCIES + 1)[:, None], np.arange(LUMA_SIZE)
    return np.sqrt(2 / LUMA_SIZE) * np.cos(np.pi / LUMA_SIZE * (position + 0.5) * frequency)


COSINE_BASIS = _cosine_basis()


def hash_image(image: Image.Image) -> int | None:
    """Return the 64-bit hash of an image, or None if it is too plain, like an image of one color.

    The highest bit belongs to the lowest frequencies.
    """
    luma = image.convert("L").resize((LUMA_SIZE, LUMA_SIZE), Image.Resampling.BOX)
    return hash_luma(np.asarray(luma))


def hash_luma(luma: UInt8[np.ndarray, "32 32"]) -> int | None:
    """Return the hash of an image's luma, or None if it is too plain."""
    coefficients = (COSINE_BASIS @ luma.astype(np.float64) @ COSINE_BASIS.T).ravel()
    if np.sqrt(np.sum(coefficients**2)) / LUMA_SIZE < MIN_RMS:
        return None
    return int(np.packbits(coefficients > np.median(coefficients)).view(">u8")[0])


def hash_source(
    source: Source, num_threads: int, progress: Callable[[int], Any] = lambda count: None
) -> ImageHashes:
    """Hash all images of a source. Images are decoded at the smallest sufficient size.

    Args:
        source: The images.
        num_threads: Number of threads that decode and hash.
        progress: Called with the number of images that are new since the last call.
    """

    def hash_at(index: int) -> int | UnusableError | None:
        try:
            return hash_image(source.load_image(index, (LUMA_SIZE, LUMA_SIZE)))
        except UnusableError as error:
            return error

    hashes, has_hash = np.zeros(len(source), np.uint64), np.zeros(len(source), bool)
    errors = {}
    for index, result in enumerate(map_in_threads(hash_at, range(len(source)), num_threads)):
        progress(1)
        if isinstance(result, UnusableError):
            errors[index] = str(result)
        elif result is not None:
            hashes[index], has_hash[index] = result, True
    return ImageHashes(hashes, has_hash, errors)


# --- groups ---------------------------------------------------------------------------------------


def find_duplicate_groups(
    image_hashes: ImageHashes,
    sizes: Real[np.ndarray, "n 2"],
    distance: int = DEFAULT_DISTANCE,
    num_threads: int = 1,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[DuplicateGroup]:
    """Group near-duplicate images around the images that are kept.

    Images are visited from the largest area to the smallest. An image is kept unless its hash is
    within `distance` of a kept image. So every dropped image has a similar kept image that is at
    least as large, and no two kept images are similar. In a chain of images that are only similar
    to their neighbors, every second one is kept.

    Args:
        image_hashes: Hashes of the images.
        sizes: Width and height of each image.
        distance: Number of bits in which the hashes of similar images may differ.
        num_threads: Number of threads that compare hashes.
        progress: Called with the number of different hashes that are new since the last call.
    """
    areas = np.prod(np.asarray(sizes, np.int64), axis=1)
    order = np.flatnonzero(image_hashes.has_hash)
    order = order[np.argsort(-areas[order], kind="stable")]
    # Equal hashes are compared once. `ranks` are the positions of their largest images in `order`.
    unique_hashes, ranks, inverse = np.unique(
        image_hashes.hashes[order], return_index=True, return_inverse=True
    )
    close_pairs = find_close_pairs(unique_hashes, distance, num_threads, progress)
    neighbors = defaultdict(list)
    for a, b in close_pairs.tolist():
        neighbors[a].append(b)
        neighbors[b].append(a)
    # A hash that is not represented by another one represents its neighbors.
    representatives = np.arange(len(unique_hashes))
    for index in sorted(neighbors, key=ranks.__getitem__):
        if representatives[index] == index:
            for neighbor in neighbors[index]:
                if representatives[neighbor] == neighbor:
                    representatives[neighbor] = index
    return _make_groups(order, representatives[inverse])


def _make_groups(
    order: Int64[np.ndarray, " n"], representatives: Int64[np.ndarray, " n"]
) -> list[DuplicateGroup]:
    """Group the images of `order` by representative, and return groups of at least two."""
    groups: dict[int, list[int]] = defaultdict(list)
    for image, representative in zip(order.tolist(), representatives.tolist()):
        groups[representative].append(image)  # the largest image first
    return sorted(
        DuplicateGroup(images[0], tuple(sorted(images[1:])))
        for images in groups.values()
        if len(images) > 1
    )


def find_close_pairs(
    hashes: Hashes,
    distance: int,
    num_threads: int = 1,
    progress: Callable[[int], Any] = lambda count: None,
) -> Pairs:
    """Find all pairs of hashes that differ in at most `distance` bits.

    Args:
        hashes: Hashes; equal ones are pairs too.
        distance: 0 to MAX_DISTANCE.
        num_threads: Number of threads.
        progress: Called with the number of hashes that are new since the last call. Each hash is
            compared with all later ones, so the first ones take longest.

    Returns:
        Indices a < b of each pair, in lexicographic order.

    Raises:
        ValueError: The distance is out of range.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"The distance {distance} must be between 0 and {MAX_DISTANCE}.")

    def compare_rows(row_start: int) -> Pairs:
        return _compare_rows(hashes, row_start, distance)

    row_starts = range(0, len(hashes), BLOCK_ROWS)
    blocks = [np.empty((0, 2), np.int64)]
    for row_start, block in zip(
        row_starts, map_in_threads(compare_rows, row_starts, num_threads, chunk_size=16)
    ):
        blocks.append(block)
        progress(min(BLOCK_ROWS, len(hashes) - row_start))
    return np.concatenate(blocks)


def _compare_rows(hashes: Hashes, row_start: int, distance: int) -> Pairs:
    """Find the close pairs of BLOCK_ROWS hashes with all later hashes."""
    rows = hashes[row_start : row_start + BLOCK_ROWS, None]
    differences = np.empty((len(rows), BLOCK_COLUMNS), np.uint64)
    distances = np.empty(differences.shape, np.uint8)
    pairs = [np.empty((0, 2), np.int64)]
    for column_start in range(row_start, len(hashes), BLOCK_COLUMNS):
        columns = hashes[column_start : column_start + BLOCK_COLUMNS]
        # Writing into the same arrays each time is twice as fast as new ones.
        np.bitwise_xor(rows, columns, out=differences[:, : len(columns)])
        np.bitwise_count(differences, out=distances)
        is_close = distances[:, : len(columns)] <= distance
        if is_close.any():
            pairs.append(np.argwhere(is_close) + np.array([row_start, column_start]))
    block_pairs = np.concatenate(pairs)
    block_pairs = block_pairs[block_pairs[:, 0] < block_pairs[:, 1]]
    return block_pairs[np.lexsort(block_pairs.T[::-1])]


def make_keep_mask(num_images: int, groups: Sequence[DuplicateGroup]) -> Bool[np.ndarray, " n"]:
    """Return which images are kept: all that are not a duplicate in a group."""
    mask = np.ones(num_images, bool)
    mask[[duplicate for group in groups for duplicate in group.duplicates]] = False
    return mask
