"""Read the objects that an image of `shapes` shows, and compare them with a caption.

The reader needs no training and no random numbers. It subtracts the background, which is the
median color of the image. In each cell it fits a set of templates by least squares: every shape
at each size, at several offsets and degrees of blur. The template that explains most of the
cell's energy is an object if it explains enough of it and has the color of an object.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy.ndimage import gaussian_filter
from scipy.optimize import linear_sum_assignment

from radiance.shapes.attributes import BACKGROUNDS, COLORS, GRID_SIZE, SIZES
from radiance.shapes.scenes import JITTER, SHAPES, SceneDescription, SceneObject, coverage

OBJECT_KINDS = tuple((size, shape) for size in SIZES for shape in SHAPES)
NUM_CELLS = GRID_SIZE * GRID_SIZE
NUM_OFFSETS = 5  # template offsets along each axis, over the range of the jitter
BLUR_STDS = (0.0, 0.05, 0.1)  # standard deviations in cells
# Distances between colors are Euclidean distances of RGB values in [-1, 1].
MAX_COLOR_DISTANCE = 0.4  # from a named color
MIN_CONTRAST = 0.35  # of an object with the background
MAX_NOISE = 0.5  # median distance of all pixels from the background, above which there is none
MIN_EXPLAINED = 0.7  # fraction of a cell's energy, without the noise that is in the whole image
# Of the squared noise over three channels: a chi-square variable with three degrees of freedom.
MEAN_OVER_MEDIAN = 3 / 2.366
BATCH_SIZE = 128  # images


class Reading(NamedTuple):
    """The objects and the background that an image shows."""

    objects: tuple[SceneObject, ...]
    background: str | None  # None where it has no background's color


# --- reading --------------------------------------------------------------------------------------


def read_pixels(images: Float[np.ndarray, "b side side 3"]) -> list[Reading]:
    """Read images of `shapes`. Noise, and images that are not finite, have an empty reading.

    Args:
        images: Square images in [-1, 1], whose resolution is a multiple of 4.

    Returns:
        A reading for each image.

    Raises:
        ValueError: The resolution is no multiple of 4.

    Example:
        An image that shows the scene exactly has a score of 1 in everything::

            scene = sample_scene(seed=0, index=0)
            pixels = np.asarray(render_scene(scene, 64), np.float32) / 127.5 - 1
            readings = read_pixels(pixels[None])
            assert set(readings[0].objects) == set(scene.objects)
            assert score_readings(readings, [scene.description]).exact == 1
    """
    resolution = images.shape[1]
    if resolution % GRID_SIZE:
        raise ValueError(
            f"Images of resolution {resolution} cannot be divided into {GRID_SIZE} × {GRID_SIZE} "
            f"cells: use a resolution that is a multiple of {GRID_SIZE}."
        )
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return [
        reading
        for batch in batches
        for reading in _read_batch(batch.astype(np.float32), _make_templates(resolution))
    ]


class Templates(NamedTuple):
    """Images of one cell that the reader looks for."""

    masks: Float32[np.ndarray, "pixels k"]  # coverage of the cell's pixels
    energies: Float32[np.ndarray, " k"]  # sums of squares
    kinds: Int[np.ndarray, " k"]  # indices of OBJECT_KINDS


@lru_cache(maxsize=8)
def _make_templates(resolution: int) -> Templates:
    cell_size = resolution // GRID_SIZE
    offsets = np.linspace(-JITTER, JITTER, NUM_OFFSETS)
    # Blur reaches into the neighboring cells, so masks are computed on 3 × 3 cells and then cut.
    centers = (np.arange(-cell_size, 2 * cell_size) + 0.5) / cell_size - 0.5
    center_cell = slice(cell_size, -cell_size)
    masks, kinds = [], []
    for kind, (size, shape) in enumerate(OBJECT_KINDS):
        for offset_x, offset_y in np.stack(np.meshgrid(offsets, offsets), -1).reshape(-1, 2):
            x, y = centers - offset_x, centers - offset_y
            sharp_mask = coverage(shape, size, x, y, 1 / cell_size)
            for blur_std in BLUR_STDS:
                mask = gaussian_filter(sharp_mask, blur_std * cell_size)
                masks.append(mask[center_cell, center_cell].ravel())
                kinds.append(kind)
    mask_matrix = np.stack(masks, -1).astype(np.float32)
    return Templates(mask_matrix, (mask_matrix**2).sum(0), np.array(kinds))


def _read_batch(
    images: Float32[np.ndarray, "b side side 3"], templates: Templates
) -> list[Reading]:
    # 1. Estimate the background. Images that are not finite, and noise, are not readable.
    is_finite = np.all(np.isfinite(images), axis=(1, 2, 3))
    images = np.clip(np.where(is_finite[:, None, None, None], images, 0), -1, 1)
    background = estimate_background(images)
    is_readable = is_finite & (background.noise_energies < MAX_NOISE**2)

    # 2. Select the cells whose energy suffices for the smallest object.
    cells = _split_cells(images - background.colors[:, None, None])
    energies = (cells**2).sum((1, 2))
    min_energy = MIN_CONTRAST**2 * templates.energies.min()
    cell_indices = np.flatnonzero(np.repeat(is_readable, NUM_CELLS) & (energies >= min_energy))
    image_indices = cell_indices // NUM_CELLS

    # 3. Fit the templates. An object has contrast and explains most of its cell's energy.
    match = match_templates(cells[cell_indices], templates)
    cell_noise = background.noise_energies[image_indices] * MEAN_OVER_MEDIAN * cells.shape[-1]
    is_object = (
        match.explained_energies >= MIN_EXPLAINED * (energies[cell_indices] - cell_noise)
    ) & ((match.amplitudes**2).sum(-1) >= MIN_CONTRAST**2)

    # 4. Name the colors. A template's amplitude is its contrast with the background.
    color_names = name_colors(background.colors[image_indices] + match.amplitudes, COLORS)
    objects: list[list[SceneObject]] = [[] for _ in images]
    for i in np.flatnonzero(is_object):
        image_index, cell_index = divmod(int(cell_indices[i]), NUM_CELLS)
        size, shape = OBJECT_KINDS[match.kinds[i]]
        color = color_names[i]
        if color is not None:
            row, column = divmod(cell_index, GRID_SIZE)
            objects[image_index].append(SceneObject(size, color, shape, row, column))
    background_names = name_colors(background.colors, BACKGROUNDS)
    return [
        Reading(tuple(scene_objects), name if readable else None)
        for scene_objects, name, readable in zip(objects, background_names, is_readable)
    ]


class BackgroundEstimate(NamedTuple):
    """The backgrounds of images."""

    colors: Float32[np.ndarray, "b 3"]
    noise_energies: Float32[np.ndarray, " b"]  # median squared distance of pixels from the color


def estimate_background(images: Float32[np.ndarray, "b side side 3"]) -> BackgroundEstimate:
    """Estimate the color and the noise of each image's background by medians over its pixels.

    Medians ignore the objects, which cover less than half of an image.
    """
    colors = np.median(images.reshape(len(images), -1, 3), axis=1)
    squared_distances = ((images - colors[:, None, None]) ** 2).sum(-1)
    return BackgroundEstimate(colors, np.median(squared_distances.reshape(len(images), -1), axis=1))


def _split_cells(
    images: Float32[np.ndarray, "b side side 3"],
) -> Float32[np.ndarray, "b*16 3 pixels"]:
    num_images, resolution = images.shape[:2]
    cell_size = resolution // GRID_SIZE
    cells = images.reshape(num_images, GRID_SIZE, cell_size, GRID_SIZE, cell_size, 3)
    return cells.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3, cell_size * cell_size)


class TemplateMatch(NamedTuple):
    """The best template of each cell."""

    kinds: Int[np.ndarray, " n"]  # indices of OBJECT_KINDS
    amplitudes: Float32[np.ndarray, "n 3"]  # per channel
    explained_energies: Float32[np.ndarray, " n"]


def match_templates(
    cells: Float32[np.ndarray, "n 3 pixels"], templates: Templates
) -> TemplateMatch:
    """Find the template that explains most of each cell's energy.

    By least squares, a template m with amplitude a = ⟨c, m⟩ / ⟨m, m⟩ in each channel c explains
    the energy ⟨c, m⟩² / ⟨m, m⟩, which is summed over the channels.

    Args:
        cells: Differences from the background.
        templates: Templates of the same cell size.
    """
    num_cells, num_channels, num_pixels = cells.shape
    products = cells.reshape(-1, num_pixels) @ templates.masks
    products = products.reshape(num_cells, num_channels, len(templates.kinds))
    explained_energies = (products**2).sum(1) / templates.energies
    best = explained_energies.argmax(-1)
    rows = np.arange(num_cells)
    amplitudes = products[rows, :, best] / templates.energies[best, None]
    return TemplateMatch(templates.kinds[best], amplitudes, explained_energies[rows, best])


def name_colors(
    colors: Float[np.ndarray, "n 3"], palette: Mapping[str, tuple[int, int, int]]
) -> list[str | None]:
    """Name the nearest color of a palette, or None where it is too far.

    Args:
        colors: RGB values in [-1, 1].
        palette: 8-bit RGB values by name.
    """
    palette_colors = np.array(list(palette.values())) / 127.5 - 1
    distances = ((colors[:, None] - palette_colors) ** 2).sum(-1)
    is_close: Bool[np.ndarray, " n"] = distances.min(-1, initial=np.inf) <= MAX_COLOR_DISTANCE**2
    names = list(palette)
    return [names[i] if close else None for i, close in zip(distances.argmin(-1), is_close)]


# --- scores ---------------------------------------------------------------------------------------


class CaptionMatch(NamedTuple):
    """Agreement of one image with one caption, as numbers of objects."""

    num_described: int
    num_counted: int  # objects of the image, without those that the caption may leave undescribed
    num_correct: int  # correct in all attributes
    # Of the described objects, which are paired with the image's so that most attributes agree.
    correct_sizes: int
    correct_colors: int
    correct_shapes: int
    correct_positions: int
    is_count_correct: bool  # the image has as many objects as the caption says
    is_background_correct: bool | None  # None where the caption names none
    is_exact: bool  # everything is correct


class SceneScores(NamedTuple):
    """Scores of a set of images, from 0 to 1. Every object has the same weight."""

    exact: float  # fraction of the images
    f1: float  # of objects that are correct in all attributes
    precision: float
    recall: float
    size: float  # fractions of the described objects
    color: float
    shape: float
    position: float
    count: float  # fraction of the images
    background: float  # fraction of the images whose caption names it; nan if there is none


def match_caption(reading: Reading, description: SceneDescription) -> CaptionMatch:
    """Compare one image with one caption.

    Objects that the caption counts but does not describe may have any attributes.
    """
    num_described, num_detected = len(description.objects), len(reading.objects)
    num_correct = len(set(reading.objects) & set(description.objects))
    num_undescribed = description.num_objects - num_described
    num_counted = num_correct + max(num_detected - num_correct - num_undescribed, 0)
    # Pair described with detected objects so that as many attributes as possible agree.
    agreements = np.zeros((num_described, num_detected, 4), int)
    for i, described in enumerate(description.objects):
        for j, detected in enumerate(reading.objects):
            agreements[i, j] = (
                described.size == detected.size,
                described.color == detected.color,
                described.shape == detected.shape,
                (described.row, described.column) == (detected.row, detected.column),
            )
    assignment = linear_sum_assignment(agreements.sum(-1), maximize=True)
    sizes, colors, shapes, positions = agreements[assignment].sum(0).tolist()
    is_count_correct = num_detected == description.num_objects
    is_background_correct = (
        None if description.background is None else reading.background == description.background
    )
    return CaptionMatch(
        num_described,
        num_counted,
        num_correct,
        correct_sizes=sizes,
        correct_colors=colors,
        correct_shapes=shapes,
        correct_positions=positions,
        is_count_correct=is_count_correct,
        is_background_correct=is_background_correct,
        is_exact=num_correct == num_described
        and is_count_correct
        and is_background_correct is not False,
    )


def score_readings(
    readings: Sequence[Reading], descriptions: Sequence[SceneDescription]
) -> SceneScores:
    """Score readings of images against the descriptions in their captions.

    Args:
        readings: One reading for each image.
        descriptions: The contents of the images' captions, in the same order.
    """
    matches = [
        match_caption(reading, description)
        for reading, description in zip(readings, descriptions, strict=True)
    ]
    num_described = sum(match.num_described for match in matches)
    num_counted = sum(match.num_counted for match in matches)
    num_correct = sum(match.num_correct for match in matches)
    backgrounds = [
        match.is_background_correct for match in matches if match.is_background_correct is not None
    ]
    return SceneScores(
        exact=_fraction(sum(match.is_exact for match in matches), len(matches)),
        f1=_fraction(2 * num_correct, num_described + num_counted),
        precision=_fraction(num_correct, num_counted),
        recall=_fraction(num_correct, num_described),
        size=_fraction(sum(match.correct_sizes for match in matches), num_described),
        color=_fraction(sum(match.correct_colors for match in matches), num_described),
        shape=_fraction(sum(match.correct_shapes for match in matches), num_described),
        position=_fraction(sum(match.correct_positions for match in matches), num_described),
        count=_fraction(sum(match.is_count_correct for match in matches), len(matches)),
        background=_fraction(sum(backgrounds), len(backgrounds)),
    )


def score_chance(
    readings: Sequence[Reading], descriptions: Sequence[SceneDescription]
) -> SceneScores:
    """Score each reading against the next image's caption, and the last against the first one's.

    A model that ignores its captions has these scores.
    """
    return score_readings(readings, [*descriptions[1:], *descriptions[:1]])


def _fraction(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else float("nan")
