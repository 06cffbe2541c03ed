"""`shapes`: images without end, each drawn from (seed, index) and known to the last attribute.

One to five objects, or fewer where that is asked for, stand in different cells of a 4×4 grid, on a plain background. Everything is
a function of (seed, index) and the side alone, through numbers from Philox and operations that IEEE 754 rounds exactly: the same
pixels on every machine.

Lengths are in cells, x to the right and y down.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from PIL import Image

from radiance.base.random import RandomStream, make_rng, random_permutation

Plane = Float64[np.ndarray, "#height #width"]
Split = Literal["train", "validation"]

GRID_SIZE = 4  # cells along a side
MAX_OBJECTS = 5  # objects of an image
# sRGB, 8 bits. Every channel leaves room for a texture.
COLORS = {
    "red": (205, 35, 40),
    "orange": (227, 125, 35),
    "yellow": (227, 210, 50),
    "green": (45, 160, 65),
    "cyan": (60, 200, 210),
    "blue": (45, 85, 220),
    "purple": (130, 50, 170),
    "pink": (227, 105, 180),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (15, 15, 15),
    "beige": (225, 205, 175),
    "brown": (95, 60, 30),
    "navy": (20, 30, 80),
}
SIZES = {"large": 1.0, "small": 0.65}
TEXTURES = ("plain", "striped", "checked")
JITTER = 0.05  # the farthest that an object's center lies from its cell's, along each axis
TEXTURE_DEPTH = (
    28  # levels by which a texture is lighter and darker than the color, which is its mean
)
TEXTURE_PERIOD = 0.34  # of a texture
SPLITS = ("train", "validation")


class SceneObject(NamedTuple):
    """What a caption can say of one. Objects of an image are a set: no two share a cell."""

    size: str
    color: str
    shape: str
    row: int  # 0 at the top
    column: int  # 0 at the left


class ObjectStyle(NamedTuple):
    """What no caption says of an object."""

    texture: str
    orientation: int  # 0 to 3: the way its stripes run, in eighths of a turn
    phase: float  # in periods
    offset_x: float  # from the cell's center
    offset_y: float


class SceneDescription(NamedTuple):
    """What is known of an image, or said of it."""

    num_objects: int  # of its objects
    objects: tuple[SceneObject, ...]  # all, or those that are mentioned
    background: str | None  # None: not mentioned


class Scene(NamedTuple):
    """All there is to know of an image."""

    seed: int
    index: int
    index: int
    split: Split
    background: str
    objects: tuple[SceneObject, ...]
    styles: tuple[ObjectStyle, ...]  # one for each object

    @property
    def description(self) -> SceneDescription:
        return SceneDescription(len(self.objects), self.objects, self.background)


# --- shapes -----------------------------------------------------------------------------------------------------------
# Signed distances from (x, y) to the edge of a large one about the origin, negative inside. Beyond a corner they are those to the
# nearer of its lines.


def _circle(x: Plane, y: Plane) -> Plane:
    return np.sqrt(x * x + y * y) - 0.38


def _square(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - 0.34


def _triangle(x: Plane, y: Plane) -> Plane:
    """Isosceles: 0.84 wide and 0.74 high, on its base."""
    return np.maximum(y - 0.33, (0.74 * np.abs(x) - 0.42 * (y + 0.41)) / np.sqrt(0.74**2 + 0.42**2))


def _star(x: Plane, y: Plane) -> Plane:
    """Five tips at 0.45, the notches between at 0.2. Mirrored into the tenth of the plane between a tip and a notch, it has one edge."""
    cosine, sine = (1 + np.sqrt(5)) / 4, np.sqrt((5 - np.sqrt(5)) / 8)  # of 36°
    x = np.abs(x)
    for normal in (cosine, -cosine):
        overshoot = np.maximum(normal * x + sine * y, 0)
        x, y = x - 2 * overshoot * normal, y - 2 * overshoot * sine
    run, rise = 0.2 * sine, 0.45 - 0.2 * cosine  # from the tip (0, -0.45) to the notch
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
# Never seen in training: one color of each shape, and no color twice.
HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "green"),
        ("square", "pink"),
        ("triangle", "blue"),
        ("star", "orange"),
        ("ring", "red"),
    }
)
SHAPE_COLOR_PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLORS)
TRAINING_PAIRS = tuple(pair for pair in SHAPE_COLOR_PAIRS if pair not in HELD_OUT_PAIRS)


def coverage(
    shape: str,
    size: str,
    x: Float64[np.ndarray, " width"],
    y: Float64[np.ndarray, " height"],
    pixel_size: float,
) -> Float64[np.ndarray, "height width"]:
    """The share of each pixel that an object about the origin covers; x, y: the pixels' centers, pixel: their side.

    Of each quarter of a pixel it is taken from the distance to the edge, which is exact but at corners.
    """
    scale, subpixel_offsets = SIZES[size], np.array([-0.25, 0.25]) * pixel_size
    x, y = ((centers[:, None] + subpixel_offsets).ravel() / scale for centers in (x, y))
    fractions = np.clip(
        0.5 - SHAPES[shape](x[None, :], y[:, None]) * (scale * 2 / pixel_size), 0, 1
    )
    return (
        fractions[::2, ::2] + fractions[::2, 1::2] + fractions[1::2, ::2] + fractions[1::2, 1::2]
    ) / 4


# --- scenes -----------------------------------------------------------------------------------------------------------


def sample_scene(
    seed: int,
    index: int,
    split: Split = "train",
    max_objects: int = MAX_OBJECTS,
    backgrounds: Sequence[str] = tuple(BACKGROUNDS),
) -> Scene:
    """Scene `index` ≥ 0 of the endless list that the seed (0 ≤ seed < 2³²) gives, of one to `most` objects (1 ≤ most ≤ 5) on one of the
    backgrounds.

    Training has none of the pairs of HELD_OUT; in validation all pairs are equally likely. All numbers are drawn whether or not
    they are needed, so that no attribute hangs on another.
    """
    rng = make_rng(seed, RandomStream.SCENE, index, SPLITS.index(split))
    u_count, u_background = rng.random(2)
    cells = random_permutation(rng, GRID_SIZE * GRID_SIZE)
    pairs = TRAINING_PAIRS if split == "train" else SHAPE_COLOR_PAIRS
    objects, styles = [], []
    for cell, uniforms in zip(cells, rng.random((1 + int(u_count * max_objects), 7)).tolist()):
        u_pair, u_size, texture, u_orientation, phase, u_x, u_y = uniforms
        shape, color = pairs[int(u_pair * len(pairs))]
        objects.append(
            SceneObject(
                list(SIZES)[int(u_size * len(SIZES))], color, shape, *divmod(int(cell), GRID_SIZE)
            )
        )
        # Half are plain.
        texture = TEXTURES[0 if texture < 0.5 else 1 + int((texture * 2 - 1) * (len(TEXTURES) - 1))]
        styles.append(
            ObjectStyle(
                texture,
                int(u_orientation * 4),
                phase,
                (u_x * 2 - 1) * JITTER,
                (u_y * 2 - 1) * JITTER,
            )
        )
    return Scene(
        seed,
        index,
        split,
        backgrounds[int(u_background * len(backgrounds))],
        tuple(objects),
        tuple(styles),
    )


# --- images ---------------------------------------------------------------------------------------------------------


def render_scene(scene: Scene, resolution: int) -> Image.Image:
    """The image at any side (pixels; below 32 shapes are hard to tell apart), edges and textures anti-aliased."""
    pixel_size = GRID_SIZE / resolution
    canvas = np.empty((resolution, resolution, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    centers = (np.arange(resolution) + 0.5) * pixel_size
    for scene_object, style in zip(scene.objects, scene.styles):
        rows, columns = (
            _cell_window(cell_index, resolution)
            for cell_index in (scene_object.row, scene_object.column)
        )
        x = centers[columns] - (scene_object.column + 0.5 + style.offset_x)
        y = centers[rows] - (scene_object.row + 0.5 + style.offset_y)
        alpha = coverage(scene_object.shape, scene_object.size, x, y, pixel_size)[..., None]
        canvas[rows, columns] += alpha * (
            _fill_color(scene_object.color, style, x, y, pixel_size) - canvas[rows, columns]
        )
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def _cell_window(cell_index: int, resolution: int) -> slice:
    """The pixels of a row or column of cells, and one more on either side, which an edge may touch."""
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
    """The color, or a texture in two shades of it whose mean it is."""
    fill = np.array(COLORS[color], np.float64)[None, None]
    if style.texture == "plain":
        return fill
    x, y = np.broadcast_arrays(x[None, :], y[:, None])
    diagonal = np.sqrt(0.5)
    across, along = (
        (x, y) if style.orientation % 2 == 0 else ((x + y) * diagonal, (x - y) * diagonal)
    )
    if style.orientation >= 2:
        across, along = along, across
    wave = _triangle_wave(across, style.phase, pixel_size)
    if style.texture == "checked":
        wave = wave * _triangle_wave(along, style.phase, pixel_size)
    return fill + TEXTURE_DEPTH * wave[..., None]


def _triangle_wave(u: Plane, phase: float, pixel_size: float) -> Plane:
    """From -1 to 1 and back in each period, in steps at least a pixel wide."""
    u = u / TEXTURE_PERIOD + phase
    wave = 4 * np.abs(u - np.floor(u) - 0.5) - 1
    return np.clip(wave * max(TEXTURE_PERIOD / pixel_size / 2, 1), -1, 1)
