"""Near-duplicates: images that were encoded again, resized, or slightly changed in color.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). The image's luma is scaled to
32 × 32 pixels whatever its proportions, and its cosine transform taken (DCT-II, orthonormal). Of the frequencies 1 to 8 along both
axes, 64 in all, each gives one bit: whether it is above their median. Brightness is in none of them, and contrast scales all alike.

Hashes within a Hamming distance are found by the pigeonhole principle (Norouzi et al., arXiv 1307.2982, with a limit for each part as
Qin et al. have it, ICDE 2018): see `pairs`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Real, UInt8, UInt64
from PIL import Image

from radiance.data.decode import UnusableError
from radiance.data.listing import map_in_threads
from radiance.data.source import Source

LUMA_SIZE = 32  # pixels
NUM_FREQUENCIES = 8  # frequencies along an axis
# Below this root mean square of the kept frequencies, in steps of 255 over the image, there is nothing to compare but noise.
MIN_RMS = 0.25
DEFAULT_DISTANCE = 4  # bits of 64 that may differ
MAX_DISTANCE = (
    11  # beyond it the search looks at nearly all pairs, and finds images that are not alike
)
NUM_SEGMENTS, SEGMENT_BITS = 4, 16  # a hash is 4 parts of 16 bits
PAIRS_PER_CHUNK = 1 << 22  # pairs that are compared in one go

Hashes = UInt64[np.ndarray, " n"]


class ImageHashes(NamedTuple):
    """The images of a source."""

    hashes: Hashes
    has_hash: Bool[
        np.ndarray, " n"
    ]  # whether there is a hash: not of images of one color, nor of broken ones
    errors: Mapping[int, str]  # why images cannot be used


class DuplicateGroup(NamedTuple):
    """Images that are near-duplicates of the first one, which is the largest."""

    representative: int
    duplicates: tuple[int, ...]


# --- hashes -------------------------------------------------------------------------------------------------------------


def _cosine_basis() -> Float64[np.ndarray, "kept side"]:
    """The rows 1 to KEPT of the orthonormal DCT-II."""
    frequency, position = np.arange(1, NUM_FREQUENCIES + 1)[:, None], np.arange(LUMA_SIZE)
    return np.sqrt(2 / LUMA_SIZE) * np.cos(np.pi / LUMA_SIZE * (position + 0.5) * frequency)


COSINE_BASIS = _cosine_basis()


def hash_image(image: Image.Image) -> int | None:
    """64 bits, the lowest vertical frequency's first; None where there is nothing to compare, as in an image of one color."""
    return hash_luma(
        np.asarray(image.convert("L").resize((LUMA_SIZE, LUMA_SIZE), Image.Resampling.BOX))
    )


def hash_luma(luma: UInt8[np.ndarray, "32 32"]) -> int | None:
    coefficients = (COSINE_BASIS @ luma.astype(np.float64) @ COSINE_BASIS.T).ravel()
    if np.sqrt(np.sum(coefficients**2)) / LUMA_SIZE < MIN_RMS:
        return None
    return int(np.packbits(coefficients > np.median(coefficients)).view(">u8")[0])


def hash_source(
    source: Source, num_threads: int, progress: Callable[[int], Any] = lambda count: None
) -> ImageHashes:
    """The hashes of all images, each decoded no larger than it must be. progress: is called with the number just done."""

    def hash_at(index: int) -> int | None | UnusableError:
        try:
            return hash_image(source.load_image(index, (LUMA_SIZE, LUMA_SIZE)))
        except UnusableError as error:
            return error

    hashes, has_hash, errors = np.zeros(len(source), np.uint64), np.zeros(len(source), bool), {}
    for index, result in enumerate(map_in_threads(hash_at, range(len(source)), num_threads)):
        progress(1)
        if isinstance(result, UnusableError):
            errors[index] = str(result)
        elif result is not None:
            hashes[index], has_hash[index] = result, True
    return ImageHashes(hashes, has_hash, errors)


# --- groups -------------------------------------------------------------------------------------------------------------


def find_duplicate_groups(
    image_hashes: ImageHashes, sizes: Real[np.ndarray, "n 2"], distance: int = DEFAULT_DISTANCE
) -> list[DuplicateGroup]:
    """Near-duplicates, a group for each image that has some.

    Images are taken by their area, the largest first and of equals the first one, and an image stays unless its hash lies within
    `distance` of one that stays. So everything that is left out has a larger or equal image like it, and no two that stay are alike.
    Of a chain of images, each like the next one alone, every second stays.
    """
    areas = np.prod(np.asarray(sizes, np.int64), axis=1)
    order = np.flatnonzero(image_hashes.has_hash)
    order = order[np.argsort(-areas[order], kind="stable")]
    unique_hashes, ranks, inverse = np.unique(
        image_hashes.hashes[order], return_index=True, return_inverse=True
    )
    neighbors = defaultdict(list)
    for a, b in find_close_pairs(unique_hashes, distance).tolist():
        neighbors[a].append(b)
        neighbors[b].append(a)
    representatives = np.arange(len(unique_hashes))  # the value that stands for each
    for hash_index in sorted(neighbors, key=ranks.__getitem__):
        if representatives[hash_index] == hash_index:
            representatives[
                [
                    neighbor
                    for neighbor in neighbors[hash_index]
                    if representatives[neighbor] == neighbor
                ]
            ] = hash_index
    return _make_groups(order, representatives[inverse])


def _make_groups(
    order: Int64[np.ndarray, " n"], representatives: Int64[np.ndarray, " n"]
) -> list[DuplicateGroup]:
    """Those of `order` that have the same number in `of`, where there are several; by their first one."""
    sorted_positions = np.argsort(
        representatives, kind="stable"
    )  # those of a group in the order of `order`
    boundaries = np.flatnonzero(np.diff(representatives[sorted_positions])) + 1
    members = [
        order[positions].tolist()
        for positions in np.split(sorted_positions, boundaries)
        if len(positions) > 1
    ]
    return sorted(
        DuplicateGroup(representative, tuple(sorted(duplicates)))
        for representative, *duplicates in members
    )


def find_close_pairs(hashes: Hashes, distance: int) -> Int64[np.ndarray, "pairs 2"]:
    """All pairs of distinct values that differ in at most `distance` bits, as numbers a < b, in their order: none is missed.

    Of four parts that are given limits t with Σ(t + 1) = distance + 1, one at least differs in no more than its t bits: if each
    differed in t + 1 or more, the values would differ in distance + 1. So each part is looked up among the equal ones and those a few bits
    away, and what is found compared as a whole. Of n values that are spread evenly this looks at n² / 2¹⁶ pairs, times 10 at distance 4, 26
    at distance 6; the time is quadratic in the end, and at worst where all values have a part in common.

    distance: 0 to FARTHEST.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"The distance {distance} must lie between 0 and {MAX_DISTANCE}.")
    pair_chunks = [np.empty((0, 2), np.int64)]
    for segment in range(NUM_SEGMENTS):
        max_bits = (distance + 1 + segment) // NUM_SEGMENTS - 1
        if max_bits >= 0:
            keys = (hashes >> np.uint64(segment * SEGMENT_BITS)).astype(np.int64) & (
                1 << SEGMENT_BITS
            ) - 1
            for a, b in _candidate_pairs(keys, max_bits):
                is_close = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
                pair_chunks.append(np.sort(np.stack([a[is_close], b[is_close]], axis=1), axis=1))
    return np.unique(np.concatenate(pair_chunks), axis=0)


def _candidate_pairs(
    keys: Int64[np.ndarray, " n"], max_bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs whose keys differ in at most `limit` bits, each once, in parts."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    starts = np.searchsorted(sorted_keys, np.arange((1 << SEGMENT_BITS) + 1))
    for num_bits in range(max_bits + 1):
        for bits in combinations(range(SEGMENT_BITS), num_bits):
            neighbor_keys = sorted_keys ^ sum(1 << bit for bit in bits)
            # Each value meets those behind it that have the other key; of two keys the lower one meets the higher.
            first = np.maximum(starts[neighbor_keys], np.arange(1, len(keys) + 1))
            counts = np.maximum(starts[neighbor_keys + 1] - first, 0)
            for left, right in _expand_ranges(first, counts):
                yield order[left], order[right]


def _expand_ranges(
    first: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each number i with first[i], first[i] + 1, … counts[i] of them, in parts of about CHUNK pairs."""
    cumulative = np.cumsum(counts)
    chunk_starts = np.searchsorted(
        cumulative, np.arange(0, int(cumulative[-1]) if len(cumulative) else 0, PAIRS_PER_CHUNK)
    )
    for begin, end in zip(chunk_starts, [*chunk_starts[1:], len(counts)]):
        chunk_counts = counts[begin:end]
        left = np.repeat(np.arange(begin, end), chunk_counts)
        yield (
            left,
            np.arange(len(left))
            - np.repeat(np.cumsum(chunk_counts) - chunk_counts - first[begin:end], chunk_counts),
        )


def keep_mask(count: int, duplicate_groups: Sequence[DuplicateGroup]) -> Bool[np.ndarray, " n"]:
    """Which of so many images stay."""
    mask = np.ones(count, bool)
    mask[[duplicate for group in duplicate_groups for duplicate in group.duplicates]] = False
    return mask
