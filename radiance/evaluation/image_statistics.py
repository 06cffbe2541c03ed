"""Image statistics without a network: spectrum, values out of range, and seams between patches.

Images are [b, height, width, 3] with values in [-1, 1].
"""

import numpy as np
from jaxtyping import Float64

from radiance.base.errors import DataError
from radiance.base.images import Images

ROUNDING_POWER = (2 / 255) ** 2 / 12  # the power of rounding to 8 bits
Spectrum = Float64[np.ndarray, " frequencies"]


def radial_spectrum(images: Images) -> Spectrum:
    """Return the power of images by distance from frequency 0, averaged over images and channels.

    White noise of variance σ² has the power σ² at every frequency. A Hann window removes the step
    between opposite edges, which is not part of an image and would dominate the high frequencies.

    Returns:
        Entry i is the power of (i + 1) ± ½ cycles along the shorter side, up to half a cycle per
        pixel. The mean of a channel, frequency 0, and the corners beyond are left out.

    Raises:
        DataError: A side is shorter than 4 pixels.
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
    ring_means = np.bincount(ring_indices, power.ravel()) / np.bincount(ring_indices)
    return ring_means[1 : min_size // 2 + 1]


def _hann_window(n: int) -> Float64[np.ndarray, " n"]:
    return np.square(np.sin(np.pi * (np.arange(n) + 0.5) / n))


def spectrum_error(generated: Spectrum, real: Spectrum) -> Spectrum:
    """Return the power of generated images over that of real ones, in decibels, by frequency.

    The power of rounding to 8 bits is added to both, so that much smaller powers do not matter.

    Args:
        generated: `radial_spectrum` of generated images.
        real: `radial_spectrum` of real images of the same size.
    """
    generated_db, real_db = (10 * np.log10(power + ROUNDING_POWER) for power in (generated, real))
    return generated_db - real_db


def root_mean_square(values: Float64[np.ndarray, " n"]) -> float:
    """Return the square root of the mean square."""
    return float(np.sqrt(np.square(values).mean()))


def clipping_fraction(images: Images) -> float:
    """Return the fraction of values out of [-1, 1], which a file would clip.

    Args:
        images: Images from the sampler, not from a file.
    """
    return float(1 - (np.abs(images) <= 1).mean())


def seam_ratio(differences: Float64[np.ndarray, " 2"]) -> float:
    """Return the mean step across patch borders over that inside patches; 1 means no seams.

    Args:
        differences: Result of `seam_differences`.
    """
    inner, border = differences
    if inner == 0:  # flat patches
        return 1.0 if border == 0 else float("inf")
    return float(border / inner)


def seam_differences(images: Images, patch_size: int) -> Float64[np.ndarray, " 2"]:
    """Return the mean absolute step between neighboring pixels inside patches and across borders.

    Args:
        images: Images to measure; the mean is over rows, columns, channels and images.
        patch_size: Side of a patch in pixels.

    Raises:
        DataError: Such patches have no border, or no inside.
    """
    _, height, width, _ = images.shape
    if not 2 <= patch_size < max(height, width):
        raise DataError(
            f"Patches of {patch_size} pixels have no seams to measure in images of "
            f"{width}×{height}."
        )
    totals, counts = np.zeros(2), np.zeros(2)  # inside, across
    for axis in (1, 2):
        other_axes = tuple({0, 1, 2, 3} - {axis})
        steps = np.abs(np.diff(images, axis=axis)).mean(axis=other_axes, dtype=np.float64)
        is_border = (np.arange(1, len(steps) + 1) % patch_size == 0).astype(int)
        num_lines = images.shape[3 - axis]
        totals += np.bincount(is_border, steps, minlength=2) * num_lines
        counts += np.bincount(is_border, minlength=2) * num_lines
    return totals / counts


class ImageStatistics:
    """Spectrum and seams of many images of one size, added batch by batch."""

    def __init__(self, patch_size: int):
        self.patch_size, self.num_images = patch_size, 0
        self._spectrum_total = np.zeros(())
        self._seam_total = np.zeros(2)

    def add(self, images: Images):
        """Add a batch."""
        self._spectrum_total = self._spectrum_total + len(images) * radial_spectrum(images)
        self._seam_total += len(images) * seam_differences(images, self.patch_size)
        self.num_images += len(images)

    @property
    def spectrum(self) -> Spectrum:
        """The mean `radial_spectrum` of all images."""
        return self._spectrum_total / self.num_images

    @property
    def seam_score(self) -> float:
        """The `seam_ratio` of all images."""
        return seam_ratio(self._seam_total / self.num_images)
