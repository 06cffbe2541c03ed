"""What a picture of `shapes` shows, read from its pixels; and how much of it is what a caption said.

The background is the median of the picture. In each cell, every shape at each size, in several places and degrees of blur, is
fitted by least squares to what differs from the background, and the one that explains most of it is taken. It is an object where
it explains most of the energy and has the colour of one. Nothing is learned and nothing is drawn by chance.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

from radiance.data.shapes import BACKGROUNDS, COLOURS, GRID, JITTER, SHAPES, SIZES, Facts, Object, coverage

KINDS = tuple((size, shape) for size in SIZES for shape in SHAPES)
PLACES = 5  # along each axis, over the jitter
BLURS = (0.0, 0.05, 0.1)  # standard deviations in cells
# Pixels are from -1 to 1, and colours as far from each other as their three channels' Euclidean distance says.
UNLIKE = 0.4  # the farthest a colour may be from its name's
FAINT = 0.35  # and the nearest that an object's may be to the background
NOISY = 0.5  # median distance of all pixels from the background, beyond which there is none
EXPLAINED = 0.7  # of the energy of what differs, apart from noise that is everywhere
MEAN_OVER_MEDIAN = 3 / 2.366  # of the square of noise, over three channels: chi-square of three degrees of freedom
BATCH = 128  # pictures at a time


class Reading(NamedTuple):
    objects: tuple[Object, ...]
    background: str | None  # None: no colour that backgrounds have


# --- reading ----------------------------------------------------------------------------------------------------------


def read(pictures: Float[np.ndarray, "b side side 3"]) -> list[Reading]:
    """What pictures in [-1, 1] show. A picture that is noise, or not finite, shows nothing.

    Raises ValueError when their side is no multiple of 4.
    """
    side = pictures.shape[1]
    if side % GRID:
        raise ValueError(f"Pictures of side {side} do not divide into {GRID}×{GRID} cells: give a side that is a multiple of {GRID}.")
    parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    return [reading for part in parts for reading in _read(part.astype(np.float32), _templates(side))]


class Templates(NamedTuple):
    masks: Float32[np.ndarray, "pixels k"]  # coverage of one cell
    energies: Float32[np.ndarray, " k"]
    kinds: Int[np.ndarray, " k"]  # of KINDS


@lru_cache(maxsize=8)
def _templates(side: int) -> Templates:
    cell, places = side // GRID, np.linspace(-JITTER, JITTER, PLACES)
    centres = (np.arange(-cell, 2 * cell) + 0.5) / cell - 0.5  # of the pixels of the neighbours too, which blur reaches
    masks, kinds = [], []
    for kind, (size, shape) in enumerate(KINDS):
        for across, down in np.stack(np.meshgrid(places, places), -1).reshape(-1, 2):
            sharp = coverage(shape, size, centres - across, centres - down, 1 / cell)
            masks += [gaussian_filter(sharp, blur * cell)[cell:-cell, cell:-cell].ravel() for blur in BLURS]
            kinds += [kind] * len(BLURS)
    stacked = np.stack(masks, -1).astype(np.float32)
    return Templates(stacked, (stacked**2).sum(0), np.array(kinds))


def _read(pictures: Float32[np.ndarray, "b side side 3"], templates: Templates) -> list[Reading]:
    finite = np.isfinite(pictures).all((1, 2, 3))
    pictures = np.clip(np.where(finite[:, None, None, None], pictures, 0), -1, 1)
    count, side = len(pictures), pictures.shape[1]
    grounds = np.median(pictures.reshape(count, -1, 3), axis=1)
    rest = pictures - grounds[:, None, None]
    spread = np.median((rest**2).sum(-1).reshape(count, -1), axis=1)
    readable = finite & (spread < NOISY**2)
    backgrounds = [name if seen else None for name, seen in zip(_named(grounds, BACKGROUNDS), readable)]

    cell = side // GRID
    cells = rest.reshape(count, GRID, cell, GRID, cell, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3, cell * cell)
    energies = (cells**2).sum((1, 2))
    # Where there is too little for the least of the objects there is none.
    places = np.flatnonzero(np.repeat(readable, GRID * GRID) & (energies >= FAINT**2 * templates.energies.min()))
    products = (cells[places].reshape(-1, cell * cell) @ templates.masks).reshape(-1, 3, len(templates.kinds))
    explained = (products**2).sum(1) / templates.energies
    best = explained.argmax(-1)
    rows = np.arange(len(places))
    amplitudes = products[rows, :, best] / templates.energies[best, None]
    colours = _named(grounds[places // GRID**2] + amplitudes, COLOURS)
    noise = spread[places // GRID**2] * MEAN_OVER_MEDIAN * cell * cell
    seen = (explained[rows, best] >= EXPLAINED * (energies[places] - noise)) & ((amplitudes**2).sum(-1) >= FAINT**2)
    objects: list[list[Object]] = [[] for _ in range(count)]
    for i in np.flatnonzero(seen):
        picture, place = divmod(int(places[i]), GRID**2)
        size, shape = KINDS[templates.kinds[best[i]]]
        if colours[i] is not None:
            objects[picture].append(Object(size, colours[i], shape, *divmod(place, GRID)))
    return [Reading(tuple(found), background) for found, background in zip(objects, backgrounds)]


def _named(values: Float[np.ndarray, "n 3"], names: dict[str, tuple[int, int, int]]) -> list[str | None]:
    """The nearest of the colours; none where that is too far."""
    colours = np.array(list(names.values())) / 127.5 - 1
    distances = ((values[:, None] - colours) ** 2).sum(-1)
    near = distances.min(-1, initial=np.inf) <= UNLIKE**2
    return [list(names)[i] if close else None for i, close in zip(distances.argmin(-1), near)]


# --- judging ----------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """One picture against one caption: numbers of objects, and whether."""

    told: int
    counted: int  # objects of the picture, but for as many as the caption does not describe
    right: int  # in all attributes
    size: int  # of those told, paired with the picture's so that as many attributes as possible agree
    colour: int
    shape: int
    place: int
    count: bool  # as many objects as the caption says
    background: bool | None  # None: not told
    exact: bool  # all of it


class Scores(NamedTuple):
    """Of a batch, from 0 to 1. Objects weigh alike, whichever picture they are in."""

    exact: float  # share of the pictures
    f1: float  # of objects that are right in all attributes
    precision: float
    recall: float
    size: float  # shares of the objects that are told
    colour: float
    shape: float
    place: float
    count: float  # share of the pictures
    background: float  # share of the pictures whose background is told; nan for none


def judge(reading: Reading, facts: Facts) -> Verdict:
    """Objects that the caption counts but does not describe may be anything."""
    right = len(set(reading.objects) & set(facts.objects))
    free = facts.count - len(facts.objects)
    counted = right + max(len(reading.objects) - right - free, 0)
    agree = np.zeros((len(facts.objects), len(reading.objects), 4), int)
    for i, told in enumerate(facts.objects):
        for j, seen in enumerate(reading.objects):
            agree[i, j] = (told.size == seen.size, told.colour == seen.colour, told.shape == seen.shape, told[3:] == seen[3:])
    pairs = linear_sum_assignment(agree.sum(-1), maximize=True)
    count = len(reading.objects) == facts.count
    background = None if facts.background is None else reading.background == facts.background
    exact = right == len(facts.objects) and count and background is not False
    return Verdict(len(facts.objects), counted, right, *agree[pairs].sum(0).tolist(), count, background, exact)


def score(readings: Sequence[Reading], facts: Sequence[Facts]) -> Scores:
    """Readings of pictures against what their captions say."""
    verdicts = [judge(reading, said) for reading, said in zip(readings, facts, strict=True)]
    told, counted, right, size, colour, shape, place = np.array([v[:7] for v in verdicts]).sum(0).tolist()
    backgrounds = [v.background for v in verdicts if v.background is not None]
    return Scores(
        exact=_share(sum(v.exact for v in verdicts), len(verdicts)),
        f1=_share(2 * right, told + counted),
        precision=_share(right, counted),
        recall=_share(right, told),
        size=_share(size, told),
        colour=_share(colour, told),
        shape=_share(shape, told),
        place=_share(place, told),
        count=_share(sum(v.count for v in verdicts), len(verdicts)),
        background=_share(sum(backgrounds), len(backgrounds)),
    )


def chance(readings: Sequence[Reading], facts: Sequence[Facts]) -> Scores:
    """The same against the next picture's caption, the first one's for the last: what a model scores that ignores captions."""
    return score(readings, [*facts[1:], *facts[:1]])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
