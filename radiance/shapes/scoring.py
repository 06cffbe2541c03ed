"""What an image of `shapes` shows, read from its pixels; and how much of it is what a caption said.

The background is the median of the image. In each cell, every shape at each size, in several places and degrees of blur, is
fitted by least squares to what differs from the background, and the one that explains most of it is taken. It is an object where
it explains most of the energy and has the color of one. Nothing is learned and nothing is drawn by chance.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

from radiance.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    GRID_SIZE,
    JITTER,
    SHAPES,
    SIZES,
    SceneDescription,
    SceneObject,
    coverage,
)

OBJECT_KINDS = tuple((size, shape) for size in SIZES for shape in SHAPES)
NUM_OFFSETS = 5  # along each axis, over the jitter
BLUR_STDS = (0.0, 0.05, 0.1)  # standard deviations in cells
# Pixels are from -1 to 1, and colors as far from each other as their three channels' Euclidean distance says.
MAX_COLOR_DISTANCE = 0.4  # the farthest a color may be from its name's
MIN_CONTRAST = 0.35  # and the nearest that an object's may be to the background
MAX_NOISE = 0.5  # median distance of all pixels from the background, beyond which there is none
MIN_EXPLAINED = 0.7  # of the energy of what differs, apart from noise that is everywhere
MEAN_OVER_MEDIAN = (
    3 / 2.366
)  # of the square of noise, over three channels: chi-square of three degrees of freedom
BATCH_SIZE = 128  # images at a time


class Reading(NamedTuple):
    objects: tuple[SceneObject, ...]
    background: str | None  # None: no color that backgrounds have


# --- reading ----------------------------------------------------------------------------------------------------------


def read_pixels(images: Float[np.ndarray, "b side side 3"]) -> list[Reading]:
    """What images in [-1, 1] show. An image that is noise, or not finite, shows nothing.

    Raises ValueError when their side is no multiple of 4.
    """
    resolution = images.shape[1]
    if resolution % GRID_SIZE:
        raise ValueError(
            f"Pictures of side {resolution} do not divide into {GRID_SIZE}×{GRID_SIZE} cells: give a side that is a multiple of {GRID_SIZE}."
        )
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return [
        reading
        for batch in batches
        for reading in _read_batch(batch.astype(np.float32), _make_templates(resolution))
    ]


class Templates(NamedTuple):
    masks: Float32[np.ndarray, "pixels k"]  # coverage of one cell
    energies: Float32[np.ndarray, " k"]
    kinds: Int[np.ndarray, " k"]  # of KINDS


@lru_cache(maxsize=8)
def _make_templates(resolution: int) -> Templates:
    cell_size, offsets = resolution // GRID_SIZE, np.linspace(-JITTER, JITTER, NUM_OFFSETS)
    centers = (
        np.arange(-cell_size, 2 * cell_size) + 0.5
    ) / cell_size - 0.5  # of the pixels of the neighbors too, which blur reaches
    masks, kinds = [], []
    for kind, (size, shape) in enumerate(OBJECT_KINDS):
        for offset_x, offset_y in np.stack(np.meshgrid(offsets, offsets), -1).reshape(-1, 2):
            sharp_mask = coverage(
                shape, size, centers - offset_x, centers - offset_y, 1 / cell_size
            )
            masks += [
                gaussian_filter(sharp_mask, blur * cell_size)[
                    cell_size:-cell_size, cell_size:-cell_size
                ].ravel()
                for blur in BLUR_STDS
            ]
            kinds += [kind] * len(BLUR_STDS)
    mask_matrix = np.stack(masks, -1).astype(np.float32)
    return Templates(mask_matrix, (mask_matrix**2).sum(0), np.array(kinds))


def _read_batch(
    images: Float32[np.ndarray, "b side side 3"], templates: Templates
) -> list[Reading]:
    is_finite = np.isfinite(images).all((1, 2, 3))
    images = np.clip(np.where(is_finite[:, None, None, None], images, 0), -1, 1)
    num_images, resolution = len(images), images.shape[1]
    background_colors = np.median(images.reshape(num_images, -1, 3), axis=1)
    residuals = images - background_colors[:, None, None]
    noise_levels = np.median((residuals**2).sum(-1).reshape(num_images, -1), axis=1)
    is_readable = is_finite & (noise_levels < MAX_NOISE**2)
    background_names = [
        name if is_visible else None
        for name, is_visible in zip(
            _nearest_color_names(background_colors, BACKGROUNDS), is_readable
        )
    ]

    cell_size = resolution // GRID_SIZE
    cells = (
        residuals.reshape(num_images, GRID_SIZE, cell_size, GRID_SIZE, cell_size, 3)
        .transpose(0, 1, 3, 5, 2, 4)
        .reshape(-1, 3, cell_size * cell_size)
    )
    energies = (cells**2).sum((1, 2))
    # Where there is too little for the least of the objects there is none.
    cell_indices = np.flatnonzero(
        np.repeat(is_readable, GRID_SIZE * GRID_SIZE)
        & (energies >= MIN_CONTRAST**2 * templates.energies.min())
    )
    correlations = (
        cells[cell_indices].reshape(-1, cell_size * cell_size) @ templates.masks
    ).reshape(-1, 3, len(templates.kinds))
    explained_energies = (correlations**2).sum(1) / templates.energies
    best_templates = explained_energies.argmax(-1)
    row_indices = np.arange(len(cell_indices))
    amplitudes = (
        correlations[row_indices, :, best_templates] / templates.energies[best_templates, None]
    )
    color_names = _nearest_color_names(
        background_colors[cell_indices // GRID_SIZE**2] + amplitudes, COLORS
    )
    noise_energies = (
        noise_levels[cell_indices // GRID_SIZE**2] * MEAN_OVER_MEDIAN * cell_size * cell_size
    )
    is_visible = (
        explained_energies[row_indices, best_templates]
        >= MIN_EXPLAINED * (energies[cell_indices] - noise_energies)
    ) & ((amplitudes**2).sum(-1) >= MIN_CONTRAST**2)
    objects: list[list[SceneObject]] = [[] for _ in range(num_images)]
    for i in np.flatnonzero(is_visible):
        image_index, cell_index = divmod(int(cell_indices[i]), GRID_SIZE**2)
        size, shape = OBJECT_KINDS[templates.kinds[best_templates[i]]]
        if color_names[i] is not None:
            objects[image_index].append(
                SceneObject(size, color_names[i], shape, *divmod(cell_index, GRID_SIZE))
            )
    return [
        Reading(tuple(scene_objects), background)
        for scene_objects, background in zip(objects, background_names)
    ]


def _nearest_color_names(
    values: Float[np.ndarray, "n 3"], palette: dict[str, tuple[int, int, int]]
) -> list[str | None]:
    """The nearest of the colors; none where that is too far."""
    palette_colors = np.array(list(palette.values())) / 127.5 - 1
    distances = ((values[:, None] - palette_colors) ** 2).sum(-1)
    close_mask = distances.min(-1, initial=np.inf) <= MAX_COLOR_DISTANCE**2
    return [
        list(palette)[i] if is_close else None
        for i, is_close in zip(distances.argmin(-1), close_mask)
    ]


# --- judging ----------------------------------------------------------------------------------------------------------


class CaptionMatch(NamedTuple):
    """One image against one caption: numbers of objects, and whether."""

    num_described: int
    num_counted: int  # objects of the image, but for as many as the caption does not describe
    num_correct: int  # in all attributes
    correct_sizes: (
        int  # of those told, paired with the image's so that as many attributes as possible agree
    )
    correct_colors: int
    correct_shapes: int
    correct_positions: int
    is_count_correct: bool  # as many objects as the caption says
    is_background_correct: bool | None  # None: not told
    is_exact: bool  # all of it


class SceneScores(NamedTuple):
    """Of a batch, from 0 to 1. Objects weigh alike, whichever image they are in."""

    exact: float  # share of the images
    f1: float  # of objects that are right in all attributes
    precision: float
    recall: float
    size: float  # shares of the objects that are told
    color: float
    shape: float
    position: float
    count: float  # share of the images
    background: float  # share of the images whose background is told; nan for none


def match_caption(reading: Reading, description: SceneDescription) -> CaptionMatch:
    """Objects that the caption counts but does not describe may be anything."""
    num_correct = len(set(reading.objects) & set(description.objects))
    num_undescribed = description.num_objects - len(description.objects)
    num_counted = num_correct + max(len(reading.objects) - num_correct - num_undescribed, 0)
    agreements = np.zeros((len(description.objects), len(reading.objects), 4), int)
    for i, described_object in enumerate(description.objects):
        for j, detected_object in enumerate(reading.objects):
            agreements[i, j] = (
                described_object.size == detected_object.size,
                described_object.color == detected_object.color,
                described_object.shape == detected_object.shape,
                described_object[3:] == detected_object[3:],
            )
    assignment = linear_sum_assignment(agreements.sum(-1), maximize=True)
    is_count_correct = len(reading.objects) == description.num_objects
    is_background_correct = (
        None if description.background is None else reading.background == description.background
    )
    is_exact = (
        num_correct == len(description.objects)
        and is_count_correct
        and is_background_correct is not False
    )
    return CaptionMatch(
        len(description.objects),
        num_counted,
        num_correct,
        *agreements[assignment].sum(0).tolist(),
        is_count_correct,
        is_background_correct,
        is_exact,
    )


def score_readings(
    readings: Sequence[Reading], descriptions: Sequence[SceneDescription]
) -> SceneScores:
    """Readings of images against what their captions say."""
    matches = [
        match_caption(reading, description)
        for reading, description in zip(readings, descriptions, strict=True)
    ]
    (
        num_described,
        num_counted,
        num_correct,
        correct_sizes,
        correct_colors,
        correct_shapes,
        correct_positions,
    ) = np.array([v[:7] for v in matches]).sum(0).tolist()
    backgrounds = [v.is_background_correct for v in matches if v.is_background_correct is not None]
    return SceneScores(
        exact=_fraction(sum(v.is_exact for v in matches), len(matches)),
        f1=_fraction(2 * num_correct, num_described + num_counted),
        precision=_fraction(num_correct, num_counted),
        recall=_fraction(num_correct, num_described),
        size=_fraction(correct_sizes, num_described),
        color=_fraction(correct_colors, num_described),
        shape=_fraction(correct_shapes, num_described),
        position=_fraction(correct_positions, num_described),
        count=_fraction(sum(v.is_count_correct for v in matches), len(matches)),
        background=_fraction(sum(backgrounds), len(backgrounds)),
    )


def score_chance(
    readings: Sequence[Reading], descriptions: Sequence[SceneDescription]
) -> SceneScores:
    """The same against the next image's caption, the first one's for the last: what a model scores that ignores captions."""
    return score_readings(readings, [*descriptions[1:], *descriptions[:1]])


def _fraction(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else float("nan")
