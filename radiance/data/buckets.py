"""Buckets: the few shapes that images of all proportions are cut to, so that a batch has one shape and few programs compile."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int16, Int64, Real

from radiance.base.settings import require
from radiance.config import Data

Extents = Real[np.ndarray, "*images"]


class BucketAssignment(NamedTuple):
    """What images may be cut to."""

    bucket_sizes: list[tuple[int, int]]  # width and height of each shape
    bucket_indices: Int16[
        np.ndarray, "sides n"
    ]  # which of them each image takes at each base resolution; -1: none, for it is too small or too long


def assign_buckets(widths: Extents, heights: Extents, data: Data) -> BucketAssignment:
    """The shapes of a config, and who fits into which."""
    bucket_sizes: list[tuple[int, int]] = []
    bucket_indices = np.full((len(data.resolutions), len(widths)), -1, np.int16)
    for row, resolution in zip(bucket_indices, data.resolutions):
        resolution_buckets = make_buckets(resolution, data.bucket_step, data.max_aspect_ratio)
        nearest_indices = nearest_bucket(widths, heights, resolution_buckets)
        bucket_widths, bucket_heights = np.array(resolution_buckets)[nearest_indices].T
        is_usable = (
            upscale_factor(widths, heights, bucket_widths, bucket_heights) <= data.max_upscale
        )
        if data.bucket_step:
            is_usable &= is_within_aspect_ratio(widths, heights, data.max_aspect_ratio)
        row[is_usable] = nearest_indices[is_usable] + len(bucket_sizes)
        bucket_sizes += resolution_buckets
    return BucketAssignment(bucket_sizes, bucket_indices)


def make_buckets(resolution: int, step: int, max_aspect_ratio: float) -> list[tuple[int, int]]:
    """(width, height) of each, from the tallest to the widest, as the published models were trained: of about side² pixels, sides
    multiples of `step`, and proportions from the square to the first beyond `ratio` on either side. `step` 0 gives the square alone.

    Raises ConfigError when the side is no multiple of the step, or the ratio is not above 1.
    """
    require(
        resolution >= 1 and step >= 0,
        f"Buckets of side {resolution} in steps of {step} cannot be: the side is at least 1, and the step 0 or more.",
    )
    require(
        max_aspect_ratio > 1,
        f"Buckets up to a ratio of {max_aspect_ratio} would hold nothing: it must be more than 1.",
    )
    if step == 0:
        return [(resolution, resolution)]
    require(
        resolution % step == 0,
        f"Buckets of side {resolution} in steps of {step} would not hold their square: make the side a multiple of the step.",
    )
    tall_buckets = []
    width = height = resolution
    while height / width <= max_aspect_ratio and resolution**2 // (height + step) >= step:
        height += step
        next_width = resolution**2 // (height * step) * step
        if next_width != width:
            tall_buckets.append((next_width, height))
        width = next_width
    return [
        *reversed(tall_buckets),
        (resolution, resolution),
        *((height, width) for width, height in tall_buckets),
    ]


def nearest_bucket(
    widths: Extents, heights: Extents, buckets: Sequence[tuple[int, int]]
) -> Int64[np.ndarray, "*images"]:
    """Index of each image's bucket: the nearest one once all are scaled to an area of 1 (Euclidean; of equals, the first)."""
    sqrt_ratio = np.sqrt(np.divide(widths, heights))
    index, best_distance = np.zeros(sqrt_ratio.shape, np.int64), np.full(sqrt_ratio.shape, np.inf)
    for i, (width, height) in enumerate(buckets):
        bucket_sqrt_ratio = np.sqrt(width / height)
        distance = (sqrt_ratio - bucket_sqrt_ratio) ** 2 + (
            1 / sqrt_ratio - 1 / bucket_sqrt_ratio
        ) ** 2
        is_nearer = distance < best_distance
        index[is_nearer], best_distance[is_nearer] = i, distance[is_nearer]
    return index


def is_within_aspect_ratio(
    widths: Extents, heights: Extents, max_aspect_ratio: float
) -> Bool[np.ndarray, "*images"]:
    """Whether neither side is `ratio` times the other, or more."""
    widths, heights = np.asarray(widths), np.asarray(heights)
    return (widths < max_aspect_ratio * heights) & (heights < max_aspect_ratio * widths)


def upscale_factor(
    widths: Extents, heights: Extents, bucket_widths: Extents, bucket_heights: Extents
) -> Float64[np.ndarray, "*images"]:
    """The factor that scales each image to cover its bucket: above 1 where it has too few pixels."""
    return np.maximum(np.divide(bucket_widths, widths), np.divide(bucket_heights, heights))
