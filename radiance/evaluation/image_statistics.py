"""What images tell without a network: their spectrum, values beyond the range, and seams where patches meet.

Images are [b, height, width, 3] in [-1, 1].
"""

import numpy as np
from jaxtyping import Float, Float64

from radiance.data.datasets import DataError

Images = Float[np.ndarray, "b height width 3"]
ROUNDING_POWER = (2 / 255) ** 2 / 12  # the power of rounding to 8 bits


def radial_spectrum(images: Images) -> Float64[np.ndarray, " frequencies"]:
    """Mean power of all images and channels by distance from frequency 0.

    Entry i stands for (i + 1) cycles along the shorter side, ± ½, up to half a cycle per pixel;
    frequency 0, the mean of a channel, is left out, and so are the corners beyond. White noise of
    variance σ² has the power σ² everywhere. A Hann window keeps the step between opposite edges,
    which is no part of an image, from drowning the high frequencies.
    """
    _, height, width, _ = images.shape
    min_size = min(height, width)
    if min_size < 4:
        raise DataError(
            f"Images of {width}×{height} are too small for a spectrum: both sides must be at least "
            "4 pixels."
        )
    window = np.outer(_hann_window(height), _hann_window(width))[..., None]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) * min_size
    ring_indices = np.rint(frequency).astype(int).ravel()
    power = np.zeros((height, width))
    for image in images:  # one at a time, for memory
        values = image.astype(np.float64)
        values -= (values * window).sum(axis=(0, 1)) / window.sum()
        power += np.square(np.abs(np.fft.fft2(values * window, axes=(0, 1)))).mean(axis=-1)
    power /= len(images) * np.square(window).sum()
    return (np.bincount(ring_indices, power.ravel()) / np.bincount(ring_indices))[
        1 : min_size // 2 + 1
    ]


def _hann_window(n: int) -> Float64[np.ndarray, " n"]:
    return np.square(np.sin(np.pi * (np.arange(n) + 0.5) / n))


def spectrum_error(
    generated: Float64[np.ndarray, " frequencies"], real: Float64[np.ndarray, " frequencies"]
) -> Float64[np.ndarray, " frequencies"]:
    """How much more power generated images have than real ones, in decibels, at each frequency of their `radial_spectrum`.

    Power far below that of rounding to 8 bits counts for nothing.
    """
    generated_db, real_db = (10 * np.log10(power + ROUNDING_POWER) for power in (generated, real))
    return generated_db - real_db


def root_mean_square(values: Float64[np.ndarray, " n"]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _format_size(images: Images) -> str:
    return f"{images.shape[2]}×{images.shape[1]}"


def clipping_fraction(images: Images) -> float:
    """The share of values that are not in [-1, 1], which a file would clip. The images must be those of the sampler, not of a file."""
    return float(1 - (np.abs(images) <= 1).mean())


def seam_ratio(differences: Float64[np.ndarray, " 2"]) -> float:
    """Of `seam_steps`: the step across borders relative to the one inside. 1 has no seams."""
    inner, border = differences
    if inner == 0:  # flat patches
        return 1.0 if border == 0 else float("inf")
    return float(border / inner)


def seam_differences(images: Images, patch_size: int) -> Float64[np.ndarray, " 2"]:
    """The mean absolute step between neighbors inside of patches, and across their borders, over rows, columns, channels and images.

    Raises DataError when there is no border or nothing else.
    """
    _, height, width, _ = images.shape
    if not 2 <= patch_size < max(height, width):
        raise DataError(
            f"Patches of {patch_size} pixels have no seams to measure in images of "
            f"{_format_size(images)}."
        )
    totals, counts = np.zeros(2), np.zeros(2)  # inside, across
    for axis in (1, 2):
        differences = np.abs(np.diff(images, axis=axis)).mean(
            axis=tuple({0, 1, 2, 3} - {axis}), dtype=np.float64
        )
        is_border = (np.arange(1, len(differences) + 1) % patch_size == 0).astype(int)
        num_lines = images.shape[3 - axis]
        totals += np.bincount(is_border, differences, minlength=2) * num_lines
        counts += np.bincount(is_border, minlength=2) * num_lines
    return totals / counts


class ImageStatistics:
    """Spectrum and seams of many images of one size, added batch by batch."""

    def __init__(self, patch_size: int):
        self.patch_size, self.num_images = patch_size, 0
        self._totals: list[np.ndarray] = [np.zeros(()), np.zeros(2)]

    def add(self, images: Images):
        means = [radial_spectrum(images), seam_differences(images, self.patch_size)]
        self._totals = [total + len(images) * value for total, value in zip(self._totals, means)]
        self.num_images += len(images)

    @property
    def spectrum(self) -> Float64[np.ndarray, " frequencies"]:
        return self._totals[0] / self.num_images

    @property
    def seam_score(self) -> float:
        return seam_ratio(self._totals[1] / self.num_images)
