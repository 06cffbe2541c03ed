"""Buckets: the published ones, and which image goes where."""

import numpy as np
import pytest

from radiance.config import ConfigError
from radiance.data.buckets import (
    is_within_aspect_ratio,
    make_buckets,
    nearest_bucket,
    upscale_factor,
)


def test_the_published_buckets():
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


@pytest.mark.parametrize("side", [64, 256, 512, 1024, 1536])
@pytest.mark.parametrize("ratio", [1.01, 2.0, 3.5, 1000.0])
def test_sides_are_whole_steps(side, ratio):
    made = make_buckets(side, 64, ratio)
    assert all(width % 64 == height % 64 == 0 < min(width, height) for width, height in made)
    assert all(width * height <= side**2 for width, height in made)
    assert set(made) == {(height, width) for width, height in made}
    assert len(set(made)) == len(made)
    assert sorted(made) == made


def test_buckets_that_cannot_be():
    for side, step, ratio, said in (
        (500, 64, 2.0, "multiple of the step"),
        (512, 64, 1.0, "more than 1"),
        (0, 64, 2.0, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_buckets(side, step, ratio)


def test_nearest_is_the_nearest():
    draw = np.random.default_rng(0)
    widths, heights = draw.integers(1, 5000, (2, 3000))
    made = make_buckets(1024, 64, 2.0)

    def unit(width, height):
        return np.array([width, height]) / np.sqrt(width * height)

    distances = [
        [np.linalg.norm(unit(w, h) - unit(*bucket)) for bucket in made]
        for w, h in zip(widths.tolist(), heights.tolist())
    ]
    assert (nearest_bucket(widths, heights, made) == np.argmin(distances, 1)).all()


def test_fits_is_strict():
    widths, heights = np.array([200, 199, 100, 100, 100]), np.array([100, 100, 200, 199, 100])
    assert is_within_aspect_ratio(widths, heights, 2.0).tolist() == [False, True, False, True, True]


def test_enlargement_is_what_covering_takes():
    factors = upscale_factor(
        np.array([100, 1000, 400]),
        np.array([200, 500, 400]),
        np.array([100, 500, 704]),
        np.array([100, 500, 320]),
    )
    assert factors.tolist() == [1.0, 1.0, 1.76]
