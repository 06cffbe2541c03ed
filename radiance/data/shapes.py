"""`shapes`: pictures without end, each drawn from (seed, index) and known to the last attribute.

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

from radiance.data.draws import Of, draws, shuffled

Plane = Float64[np.ndarray, "#height #width"]
Split = Literal["train", "validation"]

GRID = 4  # cells along a side
MOST = 5  # objects of a picture
# sRGB, 8 bits. Every channel leaves room for a texture.
COLOURS = {
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
JITTER = 0.05  # the farthest that an object's centre lies from its cell's, along each axis
DEPTH = 28  # levels by which a texture is lighter and darker than the colour, which is its mean
PERIOD = 0.34  # of a texture
SPLITS = ("train", "validation")


class Object(NamedTuple):
    """What a caption can say of one. Objects of a picture are a set: no two share a cell."""

    size: str
    colour: str
    shape: str
    row: int  # 0 at the top
    column: int  # 0 at the left


class Finish(NamedTuple):
    """What no caption says of an object."""

    texture: str
    turn: int  # 0 to 3: the way its stripes run, in eighths of a turn
    phase: float  # in periods
    across: float  # from the cell's centre
    down: float


class Facts(NamedTuple):
    """What is known of a picture, or said of it."""

    count: int  # of its objects
    objects: tuple[Object, ...]  # all, or those that are mentioned
    background: str | None  # None: not mentioned


class Scene(NamedTuple):
    """All there is to know of a picture."""

    seed: int
    index: int
    index: int
    split: Split
    background: str
    objects: tuple[Object, ...]
    finishes: tuple[Finish, ...]  # one for each object

    @property
    def facts(self) -> Facts:
        return Facts(len(self.objects), self.objects, self.background)


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
        beyond = np.maximum(normal * x + sine * y, 0)
        x, y = x - 2 * beyond * normal, y - 2 * beyond * sine
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
# Never seen in training: one colour of each shape, and no colour twice.
HELD_OUT = frozenset({("circle", "green"), ("square", "pink"), ("triangle", "blue"), ("star", "orange"), ("ring", "red")})
PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


def coverage(
    shape: str, size: str, x: Float64[np.ndarray, " width"], y: Float64[np.ndarray, " height"], pixel: float
) -> Float64[np.ndarray, "height width"]:
    """The share of each pixel that an object about the origin covers; x, y: the pixels' centres, pixel: their side.

    Of each quarter of a pixel it is taken from the distance to the edge, which is exact but at corners.
    """
    scale, quarter = SIZES[size], np.array([-0.25, 0.25]) * pixel
    x, y = ((centres[:, None] + quarter).ravel() / scale for centres in (x, y))
    covered = np.clip(0.5 - SHAPES[shape](x[None, :], y[:, None]) * (scale * 2 / pixel), 0, 1)
    return (covered[::2, ::2] + covered[::2, 1::2] + covered[1::2, ::2] + covered[1::2, 1::2]) / 4


# --- scenes -----------------------------------------------------------------------------------------------------------


def scene(seed: int, index: int, split: Split = "train", most: int = MOST, backgrounds: Sequence[str] = tuple(BACKGROUNDS)) -> Scene:
    """Scene `index` ≥ 0 of the endless list that the seed (0 ≤ seed < 2³²) gives, of one to `most` objects (1 ≤ most ≤ 5) on one of the
    backgrounds.

    Training has none of the pairs of HELD_OUT; in validation all pairs are equally likely. All numbers are drawn whether or not
    they are needed, so that no attribute hangs on another.
    """
    draw = draws(seed, Of.SCENE, index, SPLITS.index(split))
    many, background = draw.random(2)
    cells = shuffled(draw, GRID * GRID)
    pairs = SEEN if split == "train" else PAIRS
    objects, finishes = [], []
    for cell, numbers in zip(cells, draw.random((1 + int(many * most), 7)).tolist()):
        pair, size, texture, turn, phase, across, down = numbers
        shape, colour = pairs[int(pair * len(pairs))]
        objects.append(Object(list(SIZES)[int(size * len(SIZES))], colour, shape, *divmod(int(cell), GRID)))
        # Half are plain.
        texture = TEXTURES[0 if texture < 0.5 else 1 + int((texture * 2 - 1) * (len(TEXTURES) - 1))]
        finishes.append(Finish(texture, int(turn * 4), phase, (across * 2 - 1) * JITTER, (down * 2 - 1) * JITTER))
    return Scene(seed, index, split, backgrounds[int(background * len(backgrounds))], tuple(objects), tuple(finishes))


# --- pictures ---------------------------------------------------------------------------------------------------------


def render(scene: Scene, side: int) -> Image.Image:
    """The picture at any side (pixels; below 32 shapes are hard to tell apart), edges and textures anti-aliased."""
    pixel = GRID / side
    canvas = np.empty((side, side, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    centres = (np.arange(side) + 0.5) * pixel
    for thing, finish in zip(scene.objects, scene.finishes):
        rows, columns = (_window(place, side) for place in (thing.row, thing.column))
        x = centres[columns] - (thing.column + 0.5 + finish.across)
        y = centres[rows] - (thing.row + 0.5 + finish.down)
        covered = coverage(thing.shape, thing.size, x, y, pixel)[..., None]
        canvas[rows, columns] += covered * (_fill(thing.colour, finish, x, y, pixel) - canvas[rows, columns])
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def _window(place: int, side: int) -> slice:
    """The pixels of a row or column of cells, and one more on either side, which an edge may touch."""
    return slice(max(place * side // GRID - 1, 0), min(-(-(place + 1) * side // GRID) + 1, side))


def _fill(
    colour: str, finish: Finish, x: Float64[np.ndarray, " width"], y: Float64[np.ndarray, " height"], pixel: float
) -> Float64[np.ndarray, "#height #width 3"]:
    """The colour, or a texture in two shades of it whose mean it is."""
    fill = np.array(COLOURS[colour], np.float64)[None, None]
    if finish.texture == "plain":
        return fill
    x, y = np.broadcast_arrays(x[None, :], y[:, None])
    half = np.sqrt(0.5)
    across, along = (x, y) if finish.turn % 2 == 0 else ((x + y) * half, (x - y) * half)
    if finish.turn >= 2:
        across, along = along, across
    wave = _wave(across, finish.phase, pixel)
    if finish.texture == "checked":
        wave = wave * _wave(along, finish.phase, pixel)
    return fill + DEPTH * wave[..., None]


def _wave(u: Plane, phase: float, pixel: float) -> Plane:
    """From -1 to 1 and back in each period, in steps at least a pixel wide."""
    u = u / PERIOD + phase
    triangle = 4 * np.abs(u - np.floor(u) - 0.5) - 1
    return np.clip(triangle * max(PERIOD / pixel / 2, 1), -1, 1)
