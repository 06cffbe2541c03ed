"""Buckets: the few sizes that images are resized and cropped to.

All images of a batch have the size of one bucket, so that few programs are compiled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int16, Int64, Real

from radiance.base.settings import require
from radiance.config import Data

Extents = Real[np.ndarray, "*images"]  # widths or heights in pixels


class BucketAssignment(NamedTuple):
    """The bucket of each image at each resolution.

    Attributes:
        bucket_sizes: Width and height of each bucket, of all resolutions.
        bucket_indices: Index into `bucket_sizes` of each image at each resolution; −1 if the image
            is too small for the resolution or its aspect ratio is too large.
    """

    bucket_sizes: list[tuple[int, int]]
    bucket_indices: Int16[np.ndarray, "resolutions images"]


def assign_buckets(widths: Extents, heights: Extents, data: Data) -> BucketAssignment:
    """Assign each image to a bucket at each resolution of the settings.

    Args:
        widths: Widths of the images in pixels.
        heights: Heights of the images in pixels.
        data: Settings of the data.

    Returns:
        The buckets and the assignment.
    """
    bucket_sizes: list[tuple[int, int]] = []
    bucket_indices = np.full((len(data.resolutions), len(widths)), -1, np.int16)
    for row, resolution in zip(bucket_indices, data.resolutions):
        resolution_buckets = make_buckets(resolution, data.bucket_step, data.max_aspect_ratio)
        nearest_indices = nearest_bucket(widths, heights, resolution_buckets)
        bucket_widths, bucket_heights = np.array(resolution_buckets)[nearest_indices].T
        factors = upscale_factor(widths, heights, bucket_widths, bucket_heights)
        is_usable = factors <= data.max_upscale
        if data.bucket_step:
            is_usable &= is_within_aspect_ratio(widths, heights, data.max_aspect_ratio)
        row[is_usable] = nearest_indices[is_usable] + len(bucket_sizes)
        bucket_sizes += resolution_buckets
    return BucketAssignment(bucket_sizes, bucket_indices)


def make_buckets(resolution: int, step: int, max_aspect_ratio: float) -> list[tuple[int, int]]:
    """Return the buckets of a resolution as the published models were trained with them.

    Widths and heights are multiples of `step`, and their product is at most `resolution`². The
    tallest bucket is the first one beyond `max_aspect_ratio`, and so is the widest.

    Args:
        resolution: Width and height of the square bucket in pixels.
        step: Step of widths and heights in pixels; 0 gives the square bucket alone.
        max_aspect_ratio: Ratio of the longer to the shorter side up to which buckets are made.

    Returns:
        Width and height of each bucket, from the tallest to the widest.

    Raises:
        ConfigError: The resolution is not a multiple of the step, or the ratio is not above 1.
    """
    require(
        resolution >= 1 and step >= 0,
        f"Buckets of resolution {resolution} in steps of {step} are impossible: "
        "the resolution must be at least 1, and the step 0 or more.",
    )
    require(
        max_aspect_ratio > 1,
        f"Buckets up to an aspect ratio of {max_aspect_ratio} are empty: it must be more than 1.",
    )
    if step == 0:
        return [(resolution, resolution)]
    require(
        resolution % step == 0,
        f"Buckets of resolution {resolution} in steps of {step} do not contain the square: "
        "make the resolution a multiple of the step.",
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
    """Return the index of each image's bucket.

    The bucket is the nearest one by Euclidean distance of width and height, after images and
    buckets are scaled to an area of 1. The first of several equal ones is taken.

    Args:
        widths: Widths of the images.
        heights: Heights of the images.
        buckets: Width and height of each bucket.

    Returns:
        Indices into `buckets`.
    """
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
    """Return True for images whose longer side is less than the ratio times the shorter side."""
    widths, heights = np.asarray(widths), np.asarray(heights)
    return (widths < max_aspect_ratio * heights) & (heights < max_aspect_ratio * widths)


def upscale_factor(
    widths: Extents, heights: Extents, bucket_widths: Extents, bucket_heights: Extents
) -> Float64[np.ndarray, "*images"]:
    """Return the factor that scales each image to cover its bucket; above 1 is upscaling."""
    return np.maximum(np.divide(bucket_widths, widths), np.divide(bucket_heights, heights))
