"""Scores of images of `shapes`: exact readings, robust to harm, and comparisons with captions."""

from functools import cache
from math import isnan

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from radiance.shapes.attributes import BACKGROUNDS, COLORS, SIZES
from radiance.shapes.captions import make_caption
from radiance.shapes.scenes import (
    SHAPES,
    SceneDescription,
    SceneObject,
    render_scene,
    sample_scene,
)
from radiance.shapes.scoring import (
    Reading,
    match_caption,
    name_colors,
    read_pixels,
    score_chance,
    score_readings,
)

NUM_SCENES = 150
SCENES = [sample_scene(11, i, "validation") for i in range(NUM_SCENES)]
DESCRIPTIONS = [scene.description for scene in SCENES]
RNG = np.random.default_rng(0)


@cache
def scene_images(resolution):
    images = [np.asarray(render_scene(scene, resolution), np.float32) for scene in SCENES]
    return np.stack(images) / 127.5 - 1


def add_noise(std):
    return lambda x: x + std * RNG.standard_normal(x.shape).astype(np.float32)


def blur(std):
    return lambda x: gaussian_filter(x, (0, std, std, 0))


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 64, 100, 128])
def test_scenes_are_read_exactly(resolution):
    readings = read_pixels(scene_images(resolution))
    assert [(set(reading.objects), reading.background) for reading in readings] == [
        (set(description.objects), description.background) for description in DESCRIPTIONS
    ]
    assert all(score == 1 for score in score_readings(readings, DESCRIPTIONS))


@pytest.mark.parametrize(
    ("resolution", "distort", "min_f1"),
    [
        (32, blur(0.5), 0.995),
        (32, add_noise(0.1), 0.99),
        (32, add_noise(0.2), 0.96),
        (64, blur(1.0), 0.99),
        (64, blur(1.5), 0.98),
        (64, add_noise(0.2), 0.99),
        (64, lambda x: add_noise(0.1)(blur(1.0)(x)), 0.99),
        (64, lambda x: x + np.float32(0.1), 1.0),
        (64, lambda x: x + np.array([0.15, -0.15, 0.15], np.float32), 1.0),
        (64, lambda x: x * np.float32(0.8), 1.0),
    ],
)
def test_distorted_images_are_read(resolution, distort, min_f1):
    readings = read_pixels(distort(scene_images(resolution)))
    assert score_readings(readings, DESCRIPTIONS).f1 >= min_f1


def draw_all_colors(size, shape):
    """Draw a shape in every color with Pillow, independently of the distance functions."""
    image = Image.new("RGB", (1024, 1024), BACKGROUNDS["grey"])
    draw = ImageDraw.Draw(image)
    star = [
        (r * np.sin(a), -r * np.cos(a)) for r, a in zip([0.45, 0.2] * 5, np.arange(10) * np.pi / 5)
    ]
    polygons = {
        "square": [(-0.34, -0.34), (0.34, -0.34), (0.34, 0.34), (-0.34, 0.34)],
        "triangle": [(0, -0.41), (0.42, 0.33), (-0.42, 0.33)],
        "star": star,
    }
    for i, color in enumerate(COLORS):
        x, y, unit = 128 + 256 * (i % 4), 128 + 512 * (i // 4), 256 * SIZES[size]
        if shape in polygons:
            corners = [(x + a * unit, y + b * unit) for a, b in polygons[shape]]
            draw.polygon(corners, fill=COLORS[color])
        else:
            draw.circle((x, y), {"circle": 0.38, "ring": 0.41}[shape] * unit, fill=COLORS[color])
        if shape == "ring":
            draw.circle((x, y), 0.22 * unit, fill=BACKGROUNDS["grey"])
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX), np.float32) / 127.5 - 1


def test_shapes_that_another_renderer_drew_are_read():
    for size in SIZES:
        for shape in SHAPES:
            (reading,) = read_pixels(draw_all_colors(size, shape)[None])
            assert reading.background == "grey"
            assert set(reading.objects) == {
                SceneObject(size, color, shape, 2 * (i // 4), i % 4)
                for i, color in enumerate(COLORS)
            }


@pytest.mark.parametrize("resolution", [32, 64])
def test_noise_has_no_objects(resolution):
    shape = (NUM_SCENES, resolution, resolution, 3)
    std = resolution / 16
    smooth = gaussian_filter(RNG.standard_normal(shape), (0, std, std, 0))
    permuted = RNG.permuted(scene_images(resolution).reshape(NUM_SCENES, -1, 3), axis=1)
    for x in (
        RNG.standard_normal(shape),
        RNG.uniform(-1, 1, shape),
        smooth / smooth.std() / 2,
        np.full(shape, np.nan),
    ):
        assert all(reading == Reading((), None) for reading in read_pixels(x))
    for x in (0.25 * RNG.standard_normal(shape), np.zeros(shape), permuted.reshape(shape)):
        readings = read_pixels(x)
        assert score_readings(readings, DESCRIPTIONS).f1 < 0.01
        assert sum(len(reading.objects) for reading in readings) < 0.1 * NUM_SCENES


def test_other_patterns_are_not_objects():
    orange, black = (
        np.array(color) / 127.5 - 1 for color in (COLORS["orange"], BACKGROUNDS["black"])
    )
    x = np.zeros((3, 64, 64, 3)) + black
    x[0, 16:32, 16:32:4] = x[0, 16:32:4, 16:32] = orange  # a lattice
    x[1] = orange
    x[1, 20:28, 20:28] += 0.15  # a square with too little contrast
    x[2, 18:30, 18:30] = orange
    lattice, faint, square = read_pixels(x)
    assert lattice == Reading((), "black")
    assert faint.objects == ()
    assert square == Reading((SceneObject("large", "orange", "square", 1, 1),), "black")


def test_an_image_that_is_not_finite_does_not_affect_others():
    x = scene_images(64)[:3].copy()
    x[1, 5, 5, 0] = np.nan
    backgrounds = [reading.background for reading in read_pixels(x)]
    assert backgrounds == [DESCRIPTIONS[0].background, None, DESCRIPTIONS[2].background]
    assert read_pixels(x[:0]) == []


def test_a_resolution_that_cannot_be_divided_into_cells_is_an_error():
    with pytest.raises(ValueError, match="multiple of 4"):
        read_pixels(np.zeros((1, 30, 30, 3)))


def test_the_nearest_color_is_named_unless_it_is_too_far():
    red = np.array(COLORS["red"]) / 127.5 - 1
    colors = red + np.array([[0, 0, 0], [0.2, 0, 0], [0.5, 0, 0]])
    assert name_colors(colors, COLORS) == ["red", "red", None]
    assert name_colors(colors[:0], COLORS) == []


# --- scores ---------------------------------------------------------------------------------------

A, B = SceneObject("large", "red", "circle", 0, 1), SceneObject("small", "blue", "star", 3, 2)
C = SceneObject("small", "pink", "ring", 1, 1)
A_AND_B = SceneDescription(2, (A, B), "white")


def test_a_correct_image_matches_completely():
    match = match_caption(Reading((B, A), "white"), A_AND_B)
    assert match == (2, 2, 2, 2, 2, 2, 2, True, True, True)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        # counted, correct, sizes, colors, shapes, positions, count, background
        (Reading((A,), "white"), (1, 1, 1, 1, 1, 1, False, True)),
        (Reading((A, B, C), "white"), (3, 2, 2, 2, 2, 2, False, True)),
        (Reading((A, B), "black"), (2, 2, 2, 2, 2, 2, True, False)),
        (Reading((), None), (0, 0, 0, 0, 0, 0, False, False)),
        # exchanged colors: each pair agrees in the other attributes
        (
            Reading((A._replace(color="blue"), B._replace(color="red")), "white"),
            (2, 0, 2, 0, 2, 2, True, True),
        ),
        (Reading((A._replace(row=2), B), "white"), (2, 1, 2, 2, 2, 1, True, True)),
        (
            Reading((A._replace(size="small"), B._replace(shape="ring")), "white"),
            (2, 0, 1, 2, 1, 2, True, True),
        ),
    ],
)
def test_every_error_is_counted(reading, expected):
    assert match_caption(reading, A_AND_B) == (2, *expected, False)


def test_objects_that_a_caption_does_not_describe_may_have_any_attributes():
    only_a = SceneDescription(2, (A,), None)
    match = match_caption(Reading((A, C), "black"), only_a)
    assert match == (1, 1, 1, 1, 1, 1, 1, True, None, True)
    match = match_caption(Reading((A, B, C), "black"), only_a)  # one object too many
    assert (match.num_counted, match.is_count_correct, match.is_exact) == (2, False, False)


def test_scores_weight_all_objects_alike():
    scores = score_readings(
        [Reading((A,), "white"), Reading((A, B, C), "black")],
        [A_AND_B, SceneDescription(1, (C,), None)],
    )
    assert scores.precision == 2 / 4
    assert scores.recall == 2 / 3
    assert scores.f1 == 4 / 7
    assert (scores.exact, scores.count, scores.background) == (0, 0, 1)
    assert (scores.size, scores.color, scores.shape, scores.position) == (2 / 3,) * 4
    assert isnan(score_readings([Reading((), None)], [SceneDescription(1, (A,), None)]).background)


@pytest.mark.parametrize("caption_lengths", ["short", "full"])
def test_chance_is_the_score_with_captions_of_other_images(caption_lengths):
    """The tolerance is 4.5 standard deviations around the expected values."""
    described = [make_caption(scene, caption_lengths, 256).description for scene in SCENES]
    readings = [Reading(scene.objects, scene.background) for scene in SCENES]
    assert score_readings(readings, described)[:4] == (1, 1, 1, 1)
    scores = score_chance(readings, described)
    assert scores.f1 < 0.02
    assert scores.exact < 0.02
    assert abs(scores.background - 1 / 6) < 4.5 * np.sqrt(5 / 36 / (NUM_SCENES / 2))
    assert abs(scores.count - 1 / 5) < 4.5 * np.sqrt(4 / 25 / NUM_SCENES)
    next_described = [described[(i + 1) % NUM_SCENES] for i in range(NUM_SCENES)]
    assert scores == score_readings(readings, next_described)
