"""Buckets: the few shapes that pictures of all proportions are cut to, so that a batch has one shape and few programs compile."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int16, Int64, Real

from radiance.config import Data, require

Sides = Real[np.ndarray, "*pictures"]


class Shapes(NamedTuple):
    """What pictures may be cut to."""

    sizes: list[tuple[int, int]]  # width and height of each shape
    at: Int16[np.ndarray, "sides n"]  # which of them each picture takes at each base resolution; -1: none, for it is too small or too long


def shapes(widths: Sides, heights: Sides, data: Data) -> Shapes:
    """The shapes of a config, and who fits into which."""
    sizes: list[tuple[int, int]] = []
    at = np.full((len(data.sides), len(widths)), -1, np.int16)
    for row, side in zip(at, data.sides):
        of_side = buckets(side, data.bucket_step, data.bucket_ratio)
        chosen = nearest(widths, heights, of_side)
        bucket_widths, bucket_heights = np.array(of_side)[chosen].T
        fit = enlargement(widths, heights, bucket_widths, bucket_heights) <= data.enlarge
        if data.bucket_step:
            fit &= fits(widths, heights, data.bucket_ratio)
        row[fit] = chosen[fit] + len(sizes)
        sizes += of_side
    return Shapes(sizes, at)


def buckets(side: int, step: int, ratio: float) -> list[tuple[int, int]]:
    """(width, height) of each, from the tallest to the widest, as the published models were trained: of about side² pixels, sides
    multiples of `step`, and proportions from the square to the first beyond `ratio` on either side. `step` 0 gives the square alone.

    Raises ConfigError when the side is no multiple of the step, or the ratio is not above 1.
    """
    require(
        side >= 1 and step >= 0, f"Buckets of side {side} in steps of {step} cannot be: the side is at least 1, and the step 0 or more."
    )
    require(ratio > 1, f"Buckets up to a ratio of {ratio} would hold nothing: it must be more than 1.")
    if step == 0:
        return [(side, side)]
    require(
        side % step == 0, f"Buckets of side {side} in steps of {step} would not hold their square: make the side a multiple of the step."
    )
    tall = []
    width = height = side
    while height / width <= ratio and side**2 // (height + step) >= step:
        height += step
        narrower = side**2 // (height * step) * step
        if narrower != width:
            tall.append((narrower, height))
        width = narrower
    return [*reversed(tall), (side, side), *((height, width) for width, height in tall)]


def nearest(widths: Sides, heights: Sides, buckets: Sequence[tuple[int, int]]) -> Int64[np.ndarray, "*pictures"]:
    """Index of each picture's bucket: the nearest one once all are scaled to an area of 1 (Euclidean; of equals, the first)."""
    root = np.sqrt(np.divide(widths, heights))
    index, best = np.zeros(root.shape, np.int64), np.full(root.shape, np.inf)
    for i, (width, height) in enumerate(buckets):
        its_root = np.sqrt(width / height)
        distance = (root - its_root) ** 2 + (1 / root - 1 / its_root) ** 2
        nearer = distance < best
        index[nearer], best[nearer] = i, distance[nearer]
    return index


def fits(widths: Sides, heights: Sides, ratio: float) -> Bool[np.ndarray, "*pictures"]:
    """Whether neither side is `ratio` times the other, or more."""
    widths, heights = np.asarray(widths), np.asarray(heights)
    return (widths < ratio * heights) & (heights < ratio * widths)


def enlargement(widths: Sides, heights: Sides, bucket_widths: Sides, bucket_heights: Sides) -> Float64[np.ndarray, "*pictures"]:
    """The factor that scales each picture to cover its bucket: above 1 where it has too few pixels."""
    return np.maximum(np.divide(bucket_widths, widths), np.divide(bucket_heights, heights))
