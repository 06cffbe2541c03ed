"""`shapes`: images that are what their attributes say, drawn by other means; captions that say it, at a length of their own."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from radiance.config import ConfigError
from radiance.shapes.captions import FILLERS, VOCABULARY, make_caption, split_tokens
from radiance.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    JITTER,
    SHAPE_COLOR_PAIRS,
    SHAPES,
    SIZES,
    TEXTURE_DEPTH,
    TEXTURES,
    ObjectStyle,
    Scene,
    SceneObject,
    render_scene,
    sample_scene,
)
from tests.helpers.toy_runs import output_of

PLAIN = ObjectStyle("plain", 0, 0.0, 0.04, -0.03)
FINE = 16  # pixels of a reference along the side of one of ours


def pixels(image):
    return np.asarray(image, np.float64)


def alone(shape, size="large", finish=PLAIN, color="red", row=1, column=2):
    return Scene(
        0, 0, "train", "white", (SceneObject(size, color, shape, row, column),), (finish,)
    )


SCENES = [sample_scene(3, i) for i in range(600)]
FIVE = next(drawn for drawn in SCENES if len(drawn.objects) == 5)
UNSEEN = [sample_scene(3, i, "validation") for i in range(600)]


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_pinned():
    """Runs are compared over these images and captions: whoever changes them must know."""
    drawn = sample_scene(7, 34)
    assert drawn.objects[0] == SceneObject("small", "red", "triangle", 1, 0)
    assert drawn.background == "navy"
    assert hashlib.sha256(render_scene(drawn, 48).tobytes()).hexdigest()[:16] == "cea9c90559a8a346"
    assert (
        make_caption(drawn, "mixed", 64).text
        == "three: on navy, column one of row two holds a small triangle that is red, the triangle at a3 is orange and large, small purple triangle b4."
    )


def test_a_scene_is_a_function_of_seed_index_and_split():
    assert sample_scene(3, 5) == SCENES[5] != sample_scene(4, 5)
    assert sample_scene(3, 5).objects != UNSEEN[5].objects
    assert len({drawn[3:] for drawn in SCENES}) == len(SCENES)


def test_all_attributes_are_equally_likely():
    objects = [thing for drawn in SCENES for thing in drawn.objects]
    finishes = [finish for drawn in SCENES for finish in drawn.styles]
    tallies = [
        (Counter(len(drawn.objects) for drawn in SCENES), range(1, 6)),
        (Counter(drawn.background for drawn in SCENES), BACKGROUNDS),
        (Counter(thing.size for thing in objects), SIZES),
        (Counter((thing.row, thing.column) for thing in objects), np.ndindex(4, 4)),
        (
            Counter((thing.shape, thing.color) for thing in objects),
            set(SHAPE_COLOR_PAIRS) - HELD_OUT_PAIRS,
        ),
        (
            Counter((thing.shape, thing.color) for drawn in UNSEEN for thing in drawn.objects),
            SHAPE_COLOR_PAIRS,
        ),
        (Counter(finish.texture == "plain" for finish in finishes), (True, False)),
        (Counter(finish.texture for finish in finishes if finish.texture != "plain"), TEXTURES[1:]),
    ]
    for found, values in tallies:
        values = list(values)
        expected = sum(found.values()) / len(values)
        assert set(found) == set(values)
        assert all(abs(count - expected) < 4.5 * np.sqrt(expected) for count in found.values())
    assert all(
        len({(thing.row, thing.column) for thing in drawn.objects}) == len(drawn.objects)
        for drawn in SCENES
    )
    offsets = np.array([(finish.offset_x, finish.offset_y) for finish in finishes])
    assert 0.9 * JITTER < np.abs(offsets).max() <= JITTER
    assert np.abs(np.corrcoef(offsets.T)[0, 1]) < 0.1


def test_held_out_pairs_have_every_shape_and_no_color_twice():
    assert [shape for shape, _ in sorted(HELD_OUT_PAIRS)] == sorted(SHAPES)
    assert len({color for _, color in HELD_OUT_PAIRS}) == len(HELD_OUT_PAIRS)


# --- images ---------------------------------------------------------------------------------------------------------


def corners(shape):
    if shape == "square":
        return [(-0.34, -0.34), (0.34, -0.34), (0.34, 0.34), (-0.34, 0.34)]
    if shape == "triangle":
        return [(0, -0.41), (0.42, 0.33), (-0.42, 0.33)]
    return [
        (r * np.sin(a), -r * np.cos(a)) for r, a in zip([0.45, 0.2] * 5, np.arange(10) * np.pi / 5)
    ]


def inside(shape, x, y):
    """Whether points lie in a large one about the origin; of polygons, by how many edges lie to the right of them."""
    if shape in ("circle", "ring"):
        outer, inner = {"circle": (0.38, 0), "ring": (0.41, 0.22)}[shape]
        return (x * x + y * y < outer**2) & (x * x + y * y >= inner**2)
    found, points = np.zeros(np.broadcast(x, y).shape, bool), corners(shape)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1]):
        if ay != by:
            found ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return found


@pytest.mark.parametrize("side", [32, 50, 64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pixel_has_the_share_of_the_color_that_the_shape_covers(shape, size, side):
    fine = (np.arange(side * FINE) + 0.5) * 4 / (side * FINE)
    x, y = (
        (fine - 2.5 - PLAIN.offset_x)[None, :] / SIZES[size],
        (fine - 1.5 - PLAIN.offset_y)[:, None] / SIZES[size],
    )
    covered = inside(shape, x, y).reshape(side, FINE, side, FINE).mean((1, 3))[..., None]
    expected = BACKGROUNDS["white"] + covered * (np.array(COLORS["red"]) - BACKGROUNDS["white"])
    wrong = np.abs(pixels(render_scene(alone(shape, size), side)) - expected)
    edge = ((covered > 0) & (covered < 1))[..., 0]
    assert wrong[edge].mean() < 4
    assert wrong.max() < 30
    assert wrong[~edge].mean() < 0.1


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("turn", range(4))
def test_a_larger_image_is_the_same_in_more_detail(texture, turn):
    drawn = alone("square", finish=ObjectStyle(texture, turn, 0.3, 0.02, 0.01))
    large = pixels(render_scene(drawn, 512)).reshape(64, 8, 64, 8, 3).mean((1, 3))
    wrong = np.abs(pixels(render_scene(drawn, 64)) - large)
    assert wrong.mean() < 0.1
    assert wrong.max() < 20


def test_textures_are_two_shades_whose_mean_is_the_color():
    for texture, turn in (("striped", 0), ("striped", 1), ("checked", 2), ("checked", 3)):
        phases = [
            alone("square", finish=ObjectStyle(texture, turn, phase, 0.0, 0.0))
            for phase in np.arange(8) / 8
        ]
        inner = (
            np.stack([pixels(render_scene(drawn, 256)) for drawn in phases])[:, 80:112, 144:176]
            - COLORS["red"]
        )
        np.testing.assert_allclose(inner.mean((0, 1, 2)), 0, atol=2)
        assert np.abs(np.abs(inner) - TEXTURE_DEPTH).mean() < 4
        assert abs(inner).max() <= TEXTURE_DEPTH
    stripes = pixels(
        render_scene(alone("square", finish=ObjectStyle("striped", 0, 0.0, 0.0, 0.0)), 256)
    )[80:112, 144:176, 0]
    assert np.ptp(stripes, axis=0).max() == 0
    assert np.ptp(stripes, axis=1).min() == 2 * TEXTURE_DEPTH


def test_no_object_leaves_its_cell():
    """So that cells can be read one by one."""
    for drawn in SCENES[:100]:
        image = pixels(render_scene(drawn, 128)).reshape(4, 32, 4, 32, 3)
        other = np.abs(image - BACKGROUNDS[drawn.background]).max((1, 3, 4)) > 1
        assert set(zip(*np.nonzero(other))) == {
            (thing.row, thing.column) for thing in drawn.objects
        }


# --- captions ---------------------------------------------------------------------------------------------------------

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


def understood(text):
    """What a caption says, by its words alone."""
    head, *parts = re.split(r"[:,] ", text.rstrip("."))
    objects, background = set(), None
    for part in parts:
        words = part.split()
        (size, *_), (color, *_), (shape, *_) = (
            [w for w in words if w in of] or [""] for of in (SIZES, COLORS, SHAPES)
        )
        cell = next((w for w in words if re.fullmatch("[a-d][1-4]", w)), None)
        if shape:
            row, column = (
                (int(cell[1]) - 1, "abcd".index(cell[0]))
                if cell
                else (NUMBERS[words[words.index(w) + 1]] - 1 for w in ("row", "column"))
            )
            objects.add(SceneObject(size, color, shape, row, column))
        background = next((w for w in words if w in BACKGROUNDS), background)
    return next(NUMBERS[w] for w in head.split() if w in NUMBERS), objects, background


@pytest.mark.parametrize(
    ("law", "limit"), [("short", 256), ("mixed", 64), ("mixed", 256), ("full", 256)]
)
def test_captions_say_what_is_there_and_nothing_else(law, limit):
    whole = 0
    for drawn in SCENES[:300] + UNSEEN[:300]:
        text, facts = make_caption(drawn, law, limit)
        assert understood(text) == (len(drawn.objects), set(facts.objects), facts.background), text
        assert facts.num_objects == len(drawn.objects)
        assert facts.objects
        assert set(facts.objects) <= set(drawn.objects)
        assert facts.background in (None, drawn.background)
        assert set(split_tokens(text)) <= set(VOCABULARY)
        whole += len(facts.objects) == facts.num_objects
    assert whole >= {"short": 150, "mixed": 350, "full": 600}[law]


def test_length_knows_nothing_of_the_image():
    """With other objects in the image, more or fewer, a caption has as many tokens as before."""
    for law, limit, median in (
        ("short", 256, 12),
        ("mixed", 64, 23),
        ("mixed", 256, 71),
        ("full", 100, 100),
    ):
        lengths = np.array(
            [len(split_tokens(make_caption(drawn, law, limit).text)) + 1 for drawn in SCENES]
        )
        assert abs(np.median(lengths) - median) <= 0.15 * median
        assert lengths.min() >= 10
        assert lengths.max() <= limit
        for count in (1, 5):
            others = [
                make_caption(drawn._replace(objects=FIVE.objects[:count]), law, limit).text
                for drawn in SCENES
            ]
            assert [len(split_tokens(text)) + 1 for text in others] == lengths.tolist()


def test_half_of_the_captions_name_the_background():
    for law in ("short", "mixed", "full"):
        named = [make_caption(drawn, law).description.background is not None for drawn in SCENES]
        assert abs(np.mean(named) - 0.5) < 0.09


def test_filler_says_nothing_of_attributes():
    telling = {*SIZES, *COLORS, *SHAPES, *BACKGROUNDS, *NUMBERS, "row", "column", "rows", "columns"}
    assert not telling & {word for text in FILLERS for word in text.split()}


def test_a_limit_without_room_is_an_error():
    with pytest.raises(ConfigError, match="raise it"):
        make_caption(SCENES[0], "mixed", 19)


# --- as a data set ----------------------------------------------------------------------------------------------------


def test_the_data_set_has_the_same_images(tmp_path):
    from radiance.data.shapes_builder import Shapes, ShapesConfig

    made = ShapesConfig(
        name="tiny",
        side=32,
        law="short",
        objects=3,
        backgrounds=("black", "navy"),
        seed=3,
        train=6,
        validation=4,
    )
    builder = Shapes(data_dir=str(tmp_path), file_format="array_record", config=made)
    builder.download_and_prepare()
    for split, count in (("train", 6), ("validation", 4)):
        scenes = [sample_scene(3, i, split, 3, ("black", "navy")) for i in range(count)]
        rows = {row["index"]: row for row in builder.as_data_source(split=split)}
        assert sorted(rows) == list(range(len(scenes)))
        for index, row in rows.items():
            drawn, (text, facts) = scenes[index], make_caption(scenes[index], "short")
            assert np.array_equal(row["image"], np.asarray(render_scene(drawn, 32)))
            assert [c.decode() for c in row["captions"]] == [text]
            assert list(BACKGROUNDS)[row["background"]] == drawn.background
            assert row["background_told"] == (facts.background is not None)
            parts = [
                row["objects"][key] for key in ("size", "colour", "shape", "row", "column", "told")
            ]
            found = [
                (SceneObject(list(SIZES)[a], list(COLORS)[b], list(SHAPES)[c], d, e), told)
                for a, b, c, d, e, told in zip(*parts)
            ]
            assert found == [(thing, thing in facts.objects) for thing in drawn.objects]


def test_scenes_need_neither_jax_nor_tensorflow():
    told = "import sys, radiance.data.shape_captions; print({'jax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    assert output_of(told) == b"set()\n"
