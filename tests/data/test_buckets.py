"""Buckets: the published ones, and the bucket of each image."""

import numpy as np
import pytest

from radiance.config import ConfigError
from radiance.data.buckets import (
    is_within_aspect_ratio,
    make_buckets,
    nearest_bucket,
    upscale_factor,
)


def test_buckets_are_the_published_ones():
    assert make_buckets(512, 64, 2.0) == [
        (320, 704),
        (384, 640),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 384),
        (704, 320),
    ]
    assert len(make_buckets(1024, 64, 2.0)) == 11
    assert make_buckets(512, 0, 2.0) == [(512, 512)]


@pytest.mark.parametrize("resolution", [64, 256, 512, 1024, 1536])
@pytest.mark.parametrize("ratio", [1.01, 2.0, 3.5, 1000.0])
def test_widths_and_heights_are_multiples_of_the_step(resolution, ratio):
    buckets = make_buckets(resolution, 64, ratio)
    assert all(width % 64 == height % 64 == 0 < min(width, height) for width, height in buckets)
    assert all(width * height <= resolution**2 for width, height in buckets)
    assert set(buckets) == {(height, width) for width, height in buckets}
    assert len(set(buckets)) == len(buckets)
    assert sorted(buckets) == buckets


def test_impossible_buckets_raise_an_error():
    for resolution, step, ratio, message in (
        (500, 64, 2.0, "multiple of the step"),
        (512, 64, 1.0, "more than 1"),
        (0, 64, 2.0, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_buckets(resolution, step, ratio)


def test_the_nearest_bucket_has_the_smallest_distance():
    widths, heights = np.random.default_rng(0).integers(1, 5000, (2, 3000))
    buckets = make_buckets(1024, 64, 2.0)

    def scale_to_unit_area(width, height):
        return np.array([width, height]) / np.sqrt(width * height)

    distances = [
        [
            np.linalg.norm(scale_to_unit_area(width, height) - scale_to_unit_area(*bucket))
            for bucket in buckets
        ]
        for width, height in zip(widths.tolist(), heights.tolist())
    ]
    assert (nearest_bucket(widths, heights, buckets) == np.argmin(distances, 1)).all()


def test_the_maximum_aspect_ratio_is_exclusive():
    widths, heights = np.array([200, 199, 100, 100, 100]), np.array([100, 100, 200, 199, 100])
    assert is_within_aspect_ratio(widths, heights, 2.0).tolist() == [False, True, False, True, True]


def test_the_upscale_factor_covers_the_bucket():
    factors = upscale_factor(
        np.array([100, 1000, 400]),
        np.array([200, 500, 400]),
        np.array([100, 500, 704]),
        np.array([100, 500, 320]),
    )
    assert factors.tolist() == [1.0, 1.0, 1.76]
