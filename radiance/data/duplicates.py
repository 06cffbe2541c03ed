"""Near-duplicates: pictures that were encoded again, resized, or slightly changed in colour.

The hash is pHash (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010). The picture's luma is scaled to
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

from radiance.data.catalogue import in_threads
from radiance.data.datasets import Source
from radiance.data.decode import Broken

SIDE = 32  # pixels
KEPT = 8  # frequencies along an axis
# Below this root mean square of the kept frequencies, in steps of 255 over the picture, there is nothing to compare but noise.
FAINT = 0.25
DISTANCE = 4  # bits of 64 that may differ
FARTHEST = 11  # beyond it the search looks at nearly all pairs, and finds pictures that are not alike
PARTS, BITS = 4, 16  # a hash is 4 parts of 16 bits
CHUNK = 1 << 22  # pairs that are compared in one go

Hashes = UInt64[np.ndarray, " n"]


class Hashed(NamedTuple):
    """The pictures of a source."""

    hashes: Hashes
    told: Bool[np.ndarray, " n"]  # whether there is a hash: not of pictures of one colour, nor of broken ones
    broken: Mapping[int, str]  # why pictures cannot be used


class Group(NamedTuple):
    """Pictures that are near-duplicates of the first one, which is the largest."""

    kept: int
    others: tuple[int, ...]


# --- hashes -------------------------------------------------------------------------------------------------------------


def _cosines() -> Float64[np.ndarray, "kept side"]:
    """The rows 1 to KEPT of the orthonormal DCT-II."""
    frequency, place = np.arange(1, KEPT + 1)[:, None], np.arange(SIDE)
    return np.sqrt(2 / SIDE) * np.cos(np.pi / SIDE * (place + 0.5) * frequency)


COSINES = _cosines()


def picture_hash(picture: Image.Image) -> int | None:
    """64 bits, the lowest vertical frequency's first; None where there is nothing to compare, as in a picture of one colour."""
    return hash_of(np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)))


def hash_of(luma: UInt8[np.ndarray, "32 32"]) -> int | None:
    found = (COSINES @ luma.astype(np.float64) @ COSINES.T).ravel()
    if np.sqrt(np.sum(found**2)) / SIDE < FAINT:
        return None
    return int(np.packbits(found > np.median(found)).view(">u8")[0])


def hashed(source: Source, threads: int, progress: Callable[[int], Any] = lambda pictures: None) -> Hashed:
    """The hashes of all pictures, each decoded no larger than it must be. progress: is called with the number just done."""

    def look(index: int) -> int | None | Broken:
        try:
            return picture_hash(source.picture(index, (SIDE, SIDE)))
        except Broken as reason:
            return reason

    hashes, told, broken = np.zeros(len(source), np.uint64), np.zeros(len(source), bool), {}
    for index, found in enumerate(in_threads(look, range(len(source)), threads)):
        progress(1)
        if isinstance(found, Broken):
            broken[index] = str(found)
        elif found is not None:
            hashes[index], told[index] = found, True
    return Hashed(hashes, told, broken)


# --- groups -------------------------------------------------------------------------------------------------------------


def groups(hashed: Hashed, sizes: Real[np.ndarray, "n 2"], distance: int = DISTANCE) -> list[Group]:
    """Near-duplicates, a group for each picture that has some.

    Pictures are taken by their area, the largest first and of equals the first one, and a picture stays unless its hash lies within
    `distance` of one that stays. So everything that is left out has a larger or equal picture like it, and no two that stay are alike.
    Of a chain of pictures, each like the next one alone, every second stays.
    """
    area = np.prod(np.asarray(sizes, np.int64), axis=1)
    order = np.flatnonzero(hashed.told)
    order = order[np.argsort(-area[order], kind="stable")]
    values, rank, inverse = np.unique(hashed.hashes[order], return_index=True, return_inverse=True)
    near = defaultdict(list)
    for a, b in pairs(values, distance).tolist():
        near[a].append(b)
        near[b].append(a)
    of = np.arange(len(values))  # the value that stands for each
    for value in sorted(near, key=rank.__getitem__):
        if of[value] == value:
            of[[other for other in near[value] if of[other] == other]] = value
    return _grouped(order, of[inverse])


def _grouped(order: Int64[np.ndarray, " n"], of: Int64[np.ndarray, " n"]) -> list[Group]:
    """Those of `order` that have the same number in `of`, where there are several; by their first one."""
    together = np.argsort(of, kind="stable")  # those of a group in the order of `order`
    cuts = np.flatnonzero(np.diff(of[together])) + 1
    members = [order[some].tolist() for some in np.split(together, cuts) if len(some) > 1]
    return sorted(Group(first, tuple(sorted(others))) for first, *others in members)


def pairs(values: Hashes, distance: int) -> Int64[np.ndarray, "pairs 2"]:
    """All pairs of distinct values that differ in at most `distance` bits, as numbers a < b, in their order: none is missed.

    Of four parts that are given limits t with Σ(t + 1) = distance + 1, one at least differs in no more than its t bits: if each
    differed in t + 1 or more, the values would differ in distance + 1. So each part is looked up among the equal ones and those a few bits
    away, and what is found compared as a whole. Of n values that are spread evenly this looks at n² / 2¹⁶ pairs, times 10 at distance 4, 26
    at distance 6; the time is quadratic in the end, and at worst where all values have a part in common.

    distance: 0 to FARTHEST.
    """
    if not 0 <= distance <= FARTHEST:
        raise ValueError(f"The distance {distance} must lie between 0 and {FARTHEST}.")
    found = [np.empty((0, 2), np.int64)]
    for part in range(PARTS):
        limit = (distance + 1 + part) // PARTS - 1
        if limit >= 0:
            key = (values >> np.uint64(part * BITS)).astype(np.int64) & (1 << BITS) - 1
            for a, b in _candidates(key, limit):
                close = np.bitwise_count(values[a] ^ values[b]) <= distance
                found.append(np.sort(np.stack([a[close], b[close]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _candidates(key: Int64[np.ndarray, " n"], limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs whose keys differ in at most `limit` bits, each once, in parts."""
    order = np.argsort(key, kind="stable")
    sorted_key = key[order]
    begins = np.searchsorted(sorted_key, np.arange((1 << BITS) + 1))
    for count in range(limit + 1):
        for bits in combinations(range(BITS), count):
            other = sorted_key ^ sum(1 << bit for bit in bits)
            # Each value meets those behind it that have the other key; of two keys the lower one meets the higher.
            first = np.maximum(begins[other], np.arange(1, len(key) + 1))
            counts = np.maximum(begins[other + 1] - first, 0)
            for left, right in _ranges(first, counts):
                yield order[left], order[right]


def _ranges(first: np.ndarray, counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each number i with first[i], first[i] + 1, … counts[i] of them, in parts of about CHUNK pairs."""
    ends = np.cumsum(counts)
    cuts = np.searchsorted(ends, np.arange(0, int(ends[-1]) if len(ends) else 0, CHUNK))
    for begin, end in zip(cuts, [*cuts[1:], len(counts)]):
        some = counts[begin:end]
        left = np.repeat(np.arange(begin, end), some)
        yield left, np.arange(len(left)) - np.repeat(np.cumsum(some) - some - first[begin:end], some)


def kept(count: int, found: Sequence[Group]) -> Bool[np.ndarray, " n"]:
    """Which of so many pictures stay."""
    stay = np.ones(count, bool)
    stay[[other for group in found for other in group.others]] = False
    return stay
