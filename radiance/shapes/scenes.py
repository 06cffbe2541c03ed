"""Scenes of the synthetic dataset `shapes`: unlimited images with exact ground-truth attributes.

An image shows one to five objects in different cells of a 4 × 4 grid on a plain background. Every
image is a function of (seed, index) and the resolution. It is computed from Philox random numbers
and operations that IEEE 754 rounds exactly, so its pixels are the same on every machine.

Lengths are in cells; x points right and y points down.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from PIL import Image

from radiance.base.random import RandomStream, make_rng, random_permutation
from radiance.shapes.attributes import (
    BACKGROUNDS,
    COLORS,
    GRID_SIZE,
    MAX_OBJECTS,
    SIZES,
    SPLITS,
    TEXTURES,
    Split,
)

Plane = Float64[np.ndarray, "#height #width"]

JITTER = 0.05  # largest distance of an object's center from its cell's center, along each axis
# A texture is this many 8-bit levels lighter and darker than its mean, which is the color.
TEXTURE_DEPTH = 28
TEXTURE_PERIOD = 0.34


class SceneObject(NamedTuple):
    """An object's attributes, as a caption can describe them. No two objects share a cell."""

    size: str
    color: str
    shape: str
    row: int  # 0 at the top
    column: int  # 0 at the left


class ObjectStyle(NamedTuple):
    """The properties of an object that no caption describes."""

    texture: str
    orientation: int  # 0 to 3: direction of the stripes, in steps of 45°
    phase: float  # in periods
    offset_x: float  # from the cell's center
    offset_y: float


class SceneDescription(NamedTuple):
    """The attributes of an image that are known, or that its caption describes."""

    num_objects: int
    objects: tuple[SceneObject, ...]  # all objects, or those that the caption describes
    background: str | None  # None where the caption does not name it


class Scene(NamedTuple):
    """The complete specification of an image."""

    seed: int
    index: int
    split: Split
    background: str
    objects: tuple[SceneObject, ...]
    styles: tuple[ObjectStyle, ...]  # one for each object

    @property
    def description(self) -> SceneDescription:
        """The description that mentions everything."""
        return SceneDescription(len(self.objects), self.objects, self.background)


# --- shapes ---------------------------------------------------------------------------------------
# Signed distances from (x, y) to the edge of a large shape around the origin, negative inside.
# Beyond a corner they are the distances to the nearer of its two lines.


def _circle(x: Plane, y: Plane) -> Plane:
    return np.sqrt(x * x + y * y) - 0.38


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - 0.34


def _triangle(x: Plane, y: Plane) -> Plane:
    """Isosceles, 0.84 wide and 0.74 high, with a horizontal base."""
    return np.maximum(y - 0.33, (0.74 * np.abs(x) - 0.42 * (y + 0.41)) / np.sqrt(0.74**2 + 0.42**2))


def _star(x: Plane, y: Plane) -> Plane:
    """Five tips at radius 0.45, with notches between them at radius 0.2.

    Reflections map every point into the tenth of the plane between one tip and one notch, where
    the star has a single edge.
    """
    cosine, sine = (1 + np.sqrt(5)) / 4, np.sqrt((5 - np.sqrt(5)) / 8)  # of 36°
    x = np.abs(x)
    for normal in (cosine, -cosine):
        overshoot = np.maximum(normal * x + sine * y, 0)
        x, y = x - 2 * overshoot * normal, y - 2 * overshoot * sine
    run, rise = 0.2 * sine, 0.45 - 0.2 * cosine  # from the tip (0, −0.45) to the notch
    return (rise * np.abs(x) - run * (y + 0.45)) / np.sqrt(run**2 + rise**2)


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.sqrt(x * x + y * y) - 0.315) - 0.095


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
}
# These pairs never occur in training: one color of each shape, and no color twice.
HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "green"),
        ("square", "pink"),
        ("triangle", "blue"),
        ("star", "orange"),
        ("ring", "red"),
    }
)
SHAPE_COLOR_PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
TRAINING_PAIRS = tuple(pair for pair in SHAPE_COLOR_PAIRS if pair not in HELD_OUT_PAIRS)


def coverage(
    shape: str,
    size: str,
    x: Float64[np.ndarray, " width"],
    y: Float64[np.ndarray, " height"],
    pixel_size: float,
) -> Float64[np.ndarray, "height width"]:
    """Return the fraction of each pixel that an object around the origin covers.

    The fraction of each quarter of a pixel follows from its distance to the edge, which is exact
    except at corners.

    Args:
        shape: Name of the shape.
        size: Name of the size.
        x: Centers of the pixels' columns, in cells.
        y: Centers of the pixels' rows, in cells.
        pixel_size: Width and height of a pixel, in cells.
    """
    scale, subpixel_offsets = SIZES[size], np.array([-0.25, 0.25]) * pixel_size
    x, y = ((centers[:, None] + subpixel_offsets).ravel() / scale for centers in (x, y))
    distances = SHAPES[shape](x[None, :], y[:, None])
    fractions = np.clip(0.5 - distances * (scale * 2 / pixel_size), 0, 1)
    return (
        fractions[::2, ::2] + fractions[::2, 1::2] + fractions[1::2, ::2] + fractions[1::2, 1::2]
    ) / 4


# --- scenes ---------------------------------------------------------------------------------------


def sample_scene(
    seed: int,
    index: int,
    split: Split = "train",
    max_objects: int = MAX_OBJECTS,
    backgrounds: Sequence[str] = tuple(BACKGROUNDS),
) -> Scene:
    """Sample the scene with this index from the unlimited sequence of a seed.

    Training has none of HELD_OUT_PAIRS; in validation all pairs of shape and color are equally
    likely. Every random number is drawn whether it is needed or not, so that no attribute depends
    on another.

    Args:
        seed: 0 to 2³² − 1.
        index: Position in the sequence, at least 0.
        split: The two splits have different sequences.
        max_objects: Largest number of objects, 1 to 5; each number up to it is equally likely.
        backgrounds: Names of the possible backgrounds.
    """
    rng = make_rng(seed, RandomStream.SCENE, index, SPLITS.index(split))
    u_count, u_background = rng.random(2)
    num_objects = 1 + int(u_count * max_objects)
    cells = random_permutation(rng, GRID_SIZE * GRID_SIZE)
    uniforms = rng.random((num_objects, 7)).tolist()
    objects, styles = [], []
    for cell, (u_pair, u_size, *u_style) in zip(cells, uniforms):
        objects.append(_make_object(int(cell), split, u_pair, u_size))
        styles.append(_make_style(*u_style))
    background = backgrounds[int(u_background * len(backgrounds))]
    return Scene(seed, index, split, background, tuple(objects), tuple(styles))


def _make_object(cell: int, split: Split, u_pair: float, u_size: float) -> SceneObject:
    """Choose attributes by numbers in [0, 1)."""
    pairs = TRAINING_PAIRS if split == "train" else SHAPE_COLOR_PAIRS
    shape, color = pairs[int(u_pair * len(pairs))]
    size = list(SIZES)[int(u_size * len(SIZES))]
    return SceneObject(size, color, shape, *divmod(cell, GRID_SIZE))


def _make_style(
    u_texture: float, u_orientation: float, phase: float, u_x: float, u_y: float
) -> ObjectStyle:
    """Choose a style by numbers in [0, 1). Half of the objects have no texture."""
    if u_texture < 0.5:
        texture = TEXTURES[0]
    else:
        texture = TEXTURES[1 + int((u_texture * 2 - 1) * (len(TEXTURES) - 1))]
    offset_x, offset_y = (u_x * 2 - 1) * JITTER, (u_y * 2 - 1) * JITTER
    return ObjectStyle(texture, int(u_orientation * 4), phase, offset_x, offset_y)


# --- images ---------------------------------------------------------------------------------------


def render_scene(scene: Scene, resolution: int) -> Image.Image:
    """Render the square image of a scene, with anti-aliased edges and textures.

    Args:
        scene: The scene.
        resolution: Width and height in pixels. Below 32 shapes are hard to distinguish.
    """
    pixel_size = GRID_SIZE / resolution
    canvas = np.empty((resolution, resolution, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    centers = (np.arange(resolution) + 0.5) * pixel_size
    for scene_object, style in zip(scene.objects, scene.styles):
        rows = _cell_window(scene_object.row, resolution)
        columns = _cell_window(scene_object.column, resolution)
        x = centers[columns] - (scene_object.column + 0.5 + style.offset_x)
        y = centers[rows] - (scene_object.row + 0.5 + style.offset_y)
        alpha = coverage(scene_object.shape, scene_object.size, x, y, pixel_size)[..., None]
        fill = _fill_color(scene_object.color, style, x, y, pixel_size)
        canvas[rows, columns] += alpha * (fill - canvas[rows, columns])
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def _cell_window(cell_index: int, resolution: int) -> slice:
    """Return the pixels of a row or column of cells, and one more on each side for the edges."""
    return slice(
        max(cell_index * resolution // GRID_SIZE - 1, 0),
        min(-(-(cell_index + 1) * resolution // GRID_SIZE) + 1, resolution),
    )


def _fill_color(
    color: str,
    style: ObjectStyle,
    x: Float64[np.ndarray, " width"],
    y: Float64[np.ndarray, " height"],
    pixel_size: float,
) -> Float64[np.ndarray, "#height #width 3"]:
    """Return the color, or a texture of two shades whose mean is the color."""
    fill = np.array(COLORS[color], np.float64)[None, None]
    if style.texture == "plain":
        return fill
    x, y = np.broadcast_arrays(x[None, :], y[:, None])
    # Rotate the coordinates by multiples of 45°.
    diagonal = np.sqrt(0.5)
    across, along = (
        (x, y) if style.orientation % 2 == 0 else ((x + y) * diagonal, (x - y) * diagonal)
    )
    if style.orientation >= 2:
        across, along = along, across
    wave = _square_wave(across, style.phase, pixel_size)
    if style.texture == "checked":
        wave = wave * _square_wave(along, style.phase, pixel_size)
    return fill + TEXTURE_DEPTH * wave[..., None]


def _square_wave(u: Plane, phase: float, pixel_size: float) -> Plane:
    """Return a wave between −1 and 1 whose edges are at least one pixel wide."""
    u = u / TEXTURE_PERIOD + phase
    triangle_wave = 4 * np.abs(u - np.floor(u) - 0.5) - 1
    return np.clip(triangle_wave * max(TEXTURE_PERIOD / pixel_size / 2, 1), -1, 1)
