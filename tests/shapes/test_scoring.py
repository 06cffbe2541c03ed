"""The reader of `shapes`: exact on what the source draws, nothing on noise, chance on other images' captions; and how it judges."""

from functools import cache
from math import isnan

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from radiance.shapes.captions import make_caption
from radiance.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    SceneDescription,
    SceneObject,
    render_scene,
    sample_scene,
)
from radiance.shapes.scoring import (
    Reading,
    match_caption,
    read_pixels,
    score_chance,
    score_readings,
)

COUNT = 150
SCENES = [sample_scene(11, i, "validation") for i in range(COUNT)]
FACTS = [drawn.description for drawn in SCENES]
DRAW = np.random.default_rng(0)


@cache
def images(side):
    return np.stack(
        [np.asarray(render_scene(drawn, side), np.float32) / 127.5 - 1 for drawn in SCENES]
    )


def noise(sigma):
    return lambda x: x + sigma * DRAW.standard_normal(x.shape).astype(np.float32)


def blur(sigma):
    return lambda x: gaussian_filter(x, (0, sigma, sigma, 0))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 64, 100, 128])
def test_all_that_was_drawn_is_read(side):
    found = read_pixels(images(side))
    assert [(set(reading.objects), reading.background) for reading in found] == [
        (set(said.objects), said.background) for said in FACTS
    ]
    assert all(share == 1 for share in score_readings(found, FACTS))


@pytest.mark.parametrize(
    ("side", "harm", "least"),
    [
        (32, blur(0.5), 0.995),
        (32, noise(0.1), 0.99),
        (32, noise(0.2), 0.96),
        (64, blur(1.0), 0.99),
        (64, blur(1.5), 0.98),
        (64, noise(0.2), 0.99),
        (64, lambda x: noise(0.1)(blur(1.0)(x)), 0.99),
        (64, lambda x: x + np.float32(0.1), 1.0),
        (64, lambda x: x + np.array([0.15, -0.15, 0.15], np.float32), 1.0),
        (64, lambda x: x * np.float32(0.8), 1.0),
    ],
)
def test_images_may_be_a_little_wrong(side, harm, least):
    assert score_readings(read_pixels(harm(images(side))), FACTS).f1 >= least


def test_images_by_another_hand():
    """Every shape, size and color drawn by Pillow, which knows nothing of our distances."""
    for size, scale in SIZES.items():
        for shape in SHAPES:
            fine = Image.new("RGB", (1024, 1024), BACKGROUNDS["grey"])
            draw = ImageDraw.Draw(fine)
            for i, color in enumerate(COLORS):
                x, y, unit = 128 + 256 * (i % 4), 128 + 512 * (i // 4), 256 * scale
                tips = [
                    (r * np.sin(a), -r * np.cos(a))
                    for r, a in zip([0.45, 0.2] * 5, np.arange(10) * np.pi / 5)
                ]
                points = {
                    "square": [(-0.34, -0.34), (0.34, -0.34), (0.34, 0.34), (-0.34, 0.34)],
                    "star": tips,
                }
                points["triangle"] = [(0, -0.41), (0.42, 0.33), (-0.42, 0.33)]
                if shape in points:
                    draw.polygon(
                        [(x + a * unit, y + b * unit) for a, b in points[shape]],
                        fill=COLORS[color],
                    )
                for radius, fill in {
                    "circle": [(0.38, color)],
                    "ring": [(0.41, color), (0.22, None)],
                }.get(shape, ()):
                    draw.circle((x, y), radius * unit, fill=COLORS.get(fill, BACKGROUNDS["grey"]))
            (found,) = read_pixels(
                np.asarray(fine.resize((64, 64), Image.Resampling.BOX), np.float32)[None] / 127.5
                - 1
            )
            assert found.background == "grey"
            assert set(found.objects) == {
                SceneObject(size, color, shape, 2 * (i // 4), i % 4)
                for i, color in enumerate(COLORS)
            }


@pytest.mark.parametrize("side", [32, 64])
def test_noise_shows_nothing(side):
    shape = (COUNT, side, side, 3)
    smooth = gaussian_filter(DRAW.standard_normal(shape), (0, side / 16, side / 16, 0))
    shuffled = DRAW.permuted(images(side).reshape(COUNT, -1, 3), axis=1).reshape(shape)
    for x in (
        DRAW.standard_normal(shape),
        DRAW.uniform(-1, 1, shape),
        smooth / smooth.std() / 2,
        np.full(shape, np.nan),
    ):
        assert all(reading == Reading((), None) for reading in read_pixels(x))
    for x in (0.25 * DRAW.standard_normal(shape), np.zeros(shape), shuffled):
        found = read_pixels(x)
        assert score_readings(found, FACTS).f1 < 0.01
        assert sum(len(reading.objects) for reading in found) < 0.1 * COUNT


def test_what_is_no_shape_is_no_object():
    orange, black = (
        np.array(color) / 127.5 - 1 for color in (COLORS["orange"], BACKGROUNDS["black"])
    )
    x = np.zeros((3, 64, 64, 3)) + black
    x[0, 16:32, 16:32:4] = x[0, 16:32:4, 16:32] = orange  # a lattice
    x[1] = orange
    x[1, 20:28, 20:28] += 0.15  # a square that can hardly be seen
    x[2, 18:30, 18:30] = orange
    lattice, faint, square = read_pixels(x)
    assert lattice == Reading((), "black")
    assert faint.objects == ()
    assert square == Reading((SceneObject("large", "orange", "square", 1, 1),), "black")


def test_one_broken_image_harms_no_other():
    x = images(64)[:3].copy()
    x[1, 5, 5, 0] = np.nan
    assert [reading.background for reading in read_pixels(x)] == [
        FACTS[0].background,
        None,
        FACTS[2].background,
    ]
    assert read_pixels(x[:0]) == []


def test_a_side_that_makes_no_cells_is_an_error():
    with pytest.raises(ValueError, match="multiple of 4"):
        read_pixels(np.zeros((1, 30, 30, 3)))


# --- judging ----------------------------------------------------------------------------------------------------------

A, B = SceneObject("large", "red", "circle", 0, 1), SceneObject("small", "blue", "star", 3, 2)
C = SceneObject("small", "pink", "ring", 1, 1)
SAID = SceneDescription(2, (A, B), "white")


def test_a_image_that_is_right():
    assert match_caption(Reading((B, A), "white"), SAID) == (2, 2, 2, 2, 2, 2, 2, True, True, True)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        # counted, right, size, color, shape, place, count, background
        (Reading((A,), "white"), (1, 1, 1, 1, 1, 1, False, True)),
        (Reading((A, B, C), "white"), (3, 2, 2, 2, 2, 2, False, True)),
        (Reading((A, B), "black"), (2, 2, 2, 2, 2, 2, True, False)),
        (Reading((), None), (0, 0, 0, 0, 0, 0, False, False)),
        # colors that went to the wrong objects: each pair agrees in the rest
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
def test_what_is_wrong_counts_against_it(reading, expected):
    assert match_caption(reading, SAID) == (2, *expected, False)


def test_objects_that_a_caption_does_not_describe_may_be_anything():
    said = SceneDescription(2, (A,), None)
    assert match_caption(Reading((A, C), "black"), said) == (1, 1, 1, 1, 1, 1, 1, True, None, True)
    verdict = match_caption(Reading((A, B, C), "black"), said)  # one more than there should be
    assert (verdict.num_counted, verdict.is_count_correct, verdict.is_exact) == (2, False, False)


def test_scores_add_up_over_objects():
    scores = score_readings(
        [Reading((A,), "white"), Reading((A, B, C), "black")],
        [SAID, SceneDescription(1, (C,), None)],
    )
    assert scores.precision == 2 / 4
    assert scores.recall == 2 / 3
    assert scores.f1 == 4 / 7
    assert (scores.exact, scores.count, scores.background) == (0, 0, 1)
    assert (scores.size, scores.color, scores.shape, scores.position) == (2 / 3,) * 4
    assert isnan(score_readings([Reading((), None)], [SceneDescription(1, (A,), None)]).background)


@pytest.mark.parametrize("law", ["short", "full"])
def test_chance_is_what_other_captions_get(law):
    """What is right without looking at the caption; 4.5 standard deviations about what the laws of `shapes` say."""
    said = [make_caption(drawn, law).description for drawn in SCENES]
    found = [Reading(drawn.objects, drawn.background) for drawn in SCENES]
    assert score_readings(found, said)[:4] == (1, 1, 1, 1)
    scores = score_chance(found, said)
    assert scores.f1 < 0.02
    assert scores.exact < 0.02
    assert abs(scores.background - 1 / 6) < 4.5 * np.sqrt(5 / 36 / (COUNT / 2))
    assert abs(scores.count - 1 / 5) < 4.5 * np.sqrt(4 / 25 / COUNT)
    assert score_chance(found, said) == score_readings(
        found, [said[(i + 1) % COUNT] for i in range(COUNT)]
    )
