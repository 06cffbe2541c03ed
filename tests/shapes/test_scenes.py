"""Scenes of `shapes`: their random attributes, and their images."""

import hashlib
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from radiance.shapes.attributes import BACKGROUNDS, COLORS, SIZES, TEXTURES, Background
from radiance.shapes.captions import make_caption
from radiance.shapes.scenes import (
    HELD_OUT_PAIRS,
    JITTER,
    SHAPE_COLOR_PAIRS,
    SHAPES,
    TEXTURE_DEPTH,
    ObjectStyle,
    Scene,
    SceneObject,
    render_scene,
    sample_scene,
)
from tests.helpers.toy_runs import output_of

PLAIN = ObjectStyle("plain", 0, 0.0, 0.04, -0.03)
OVERSAMPLING = 16  # reference pixels along the side of a pixel
TRAINING_SCENES = [sample_scene(3, i) for i in range(600)]
VALIDATION_SCENES = [sample_scene(3, i, "validation") for i in range(600)]


def pixels(image):
    return np.asarray(image, np.float64)


def single_object_scene(shape, size="large", style=PLAIN):
    scene_object = SceneObject(size, "red", shape, row=1, column=2)
    return Scene(0, 0, "train", "white", (scene_object,), (style,))


# --- scenes ---------------------------------------------------------------------------------------


def test_scenes_images_and_captions_do_not_change():
    """Runs are compared on these images and captions, so a change must be deliberate."""
    scene = sample_scene(7, 34)
    assert scene.objects[0] == SceneObject("small", "red", "triangle", 1, 0)
    assert scene.background == "navy"
    assert hashlib.sha256(render_scene(scene, 48).tobytes()).hexdigest()[:16] == "cea9c90559a8a346"
    assert (
        make_caption(scene, "mixed", 64).text
        == "three: on navy, column one of row two holds a small triangle that is red, "
        "the triangle at a3 is orange and large, small purple triangle b4."
    )


def test_a_scene_is_a_function_of_seed_index_and_split():
    assert sample_scene(3, 5) == TRAINING_SCENES[5] != sample_scene(4, 5)
    assert sample_scene(3, 5).objects != VALIDATION_SCENES[5].objects
    assert len({scene[3:] for scene in TRAINING_SCENES}) == len(TRAINING_SCENES)


def test_all_attributes_are_equally_likely():
    objects = [scene_object for scene in TRAINING_SCENES for scene_object in scene.objects]
    validation_objects = [item for scene in VALIDATION_SCENES for item in scene.objects]
    styles = [style for scene in TRAINING_SCENES for style in scene.styles]
    distributions = [
        (Counter(len(scene.objects) for scene in TRAINING_SCENES), range(1, 6)),
        (Counter(scene.background for scene in TRAINING_SCENES), BACKGROUNDS),
        (Counter(item.size for item in objects), SIZES),
        (Counter((item.row, item.column) for item in objects), np.ndindex(4, 4)),
        (
            Counter((item.shape, item.color) for item in objects),
            set(SHAPE_COLOR_PAIRS) - HELD_OUT_PAIRS,
        ),
        (Counter((item.shape, item.color) for item in validation_objects), SHAPE_COLOR_PAIRS),
        (Counter(style.texture == "plain" for style in styles), (True, False)),
        (Counter(style.texture for style in styles if style.texture != "plain"), TEXTURES[1:]),
    ]
    for counts, values in distributions:
        values = list(values)
        expected = sum(counts.values()) / len(values)
        assert set(counts) == set(values)
        assert all(abs(count - expected) < 4.5 * np.sqrt(expected) for count in counts.values())
    for scene in TRAINING_SCENES:
        assert len({(item.row, item.column) for item in scene.objects}) == len(scene.objects)
    offsets = np.array([(style.offset_x, style.offset_y) for style in styles])
    assert 0.9 * JITTER < np.abs(offsets).max() <= JITTER
    assert np.abs(np.corrcoef(offsets.T)[0, 1]) < 0.1


def test_held_out_pairs_have_every_shape_and_no_color_twice():
    assert [shape for shape, _ in sorted(HELD_OUT_PAIRS)] == sorted(SHAPES)
    assert len({color for _, color in HELD_OUT_PAIRS}) == len(HELD_OUT_PAIRS)


def test_every_background_has_a_color():
    assert tuple(BACKGROUNDS) == get_args(Background)


# --- images ---------------------------------------------------------------------------------------


def corners(shape):
    if shape == "square":
        return [(-0.34, -0.34), (0.34, -0.34), (0.34, 0.34), (-0.34, 0.34)]
    if shape == "triangle":
        return [(0, -0.41), (0.42, 0.33), (-0.42, 0.33)]
    return [
        (r * np.sin(a), -r * np.cos(a)) for r, a in zip([0.45, 0.2] * 5, np.arange(10) * np.pi / 5)
    ]


def is_inside(shape, x, y):
    """Return which points are in a large shape around the origin.

    A point is in a polygon if an odd number of edges is to its right.
    """
    if shape in ("circle", "ring"):
        outer, inner = {"circle": (0.38, 0), "ring": (0.41, 0.22)}[shape]
        return (x * x + y * y < outer**2) & (x * x + y * y >= inner**2)
    inside, points = np.zeros(np.broadcast(x, y).shape, bool), corners(shape)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1]):
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return inside


@pytest.mark.parametrize("resolution", [32, 50, 64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pixel_is_blended_by_the_fraction_that_the_shape_covers(shape, size, resolution):
    fine = (np.arange(resolution * OVERSAMPLING) + 0.5) * 4 / (resolution * OVERSAMPLING)
    x = (fine - 2.5 - PLAIN.offset_x)[None, :] / SIZES[size]
    y = (fine - 1.5 - PLAIN.offset_y)[:, None] / SIZES[size]
    blocks = is_inside(shape, x, y).reshape(resolution, OVERSAMPLING, resolution, OVERSAMPLING)
    covered = blocks.mean((1, 3))[..., None]
    expected = BACKGROUNDS["white"] + covered * (np.array(COLORS["red"]) - BACKGROUNDS["white"])
    image = pixels(render_scene(single_object_scene(shape, size), resolution))
    errors = np.abs(image - expected)
    is_edge = ((covered > 0) & (covered < 1))[..., 0]
    assert errors[is_edge].mean() < 4
    assert errors.max() < 30
    assert errors[~is_edge].mean() < 0.1


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("orientation", range(4))
def test_a_larger_image_shows_the_same_in_more_detail(texture, orientation):
    style = ObjectStyle(texture, orientation, 0.3, 0.02, 0.01)
    scene = single_object_scene("square", style=style)
    large = pixels(render_scene(scene, 512)).reshape(64, 8, 64, 8, 3).mean((1, 3))
    errors = np.abs(pixels(render_scene(scene, 64)) - large)
    assert errors.mean() < 0.1
    assert errors.max() < 20


def test_textures_are_two_shades_whose_mean_is_the_color():
    for texture, orientation in (("striped", 0), ("striped", 1), ("checked", 2), ("checked", 3)):
        scenes = [
            single_object_scene("square", style=ObjectStyle(texture, orientation, phase, 0.0, 0.0))
            for phase in np.arange(8) / 8
        ]
        images = np.stack([pixels(render_scene(scene, 256)) for scene in scenes])
        differences = images[:, 80:112, 144:176] - COLORS["red"]
        np.testing.assert_allclose(differences.mean((0, 1, 2)), 0, atol=2)
        assert np.abs(np.abs(differences) - TEXTURE_DEPTH).mean() < 4
        assert abs(differences).max() <= TEXTURE_DEPTH
    scene = single_object_scene("square", style=ObjectStyle("striped", 0, 0.0, 0.0, 0.0))
    stripes = pixels(render_scene(scene, 256))[80:112, 144:176, 0]
    assert np.ptp(stripes, axis=0).max() == 0
    assert np.ptp(stripes, axis=1).min() == 2 * TEXTURE_DEPTH


def test_no_object_leaves_its_cell():
    """The scoring reads cells one by one."""
    for scene in TRAINING_SCENES[:100]:
        image = pixels(render_scene(scene, 128)).reshape(4, 32, 4, 32, 3)
        is_used = np.abs(image - BACKGROUNDS[scene.background]).max((1, 3, 4)) > 1
        cells = {(item.row, item.column) for item in scene.objects}
        assert set(zip(*np.nonzero(is_used))) == cells


def test_scenes_need_neither_jax_nor_tensorflow():
    code = (
        "import sys, radiance.shapes.captions; "
        "print({'jax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    )
    assert output_of(code) == b"set()\n"
