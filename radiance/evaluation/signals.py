"""What pictures tell without a network: their spectrum, values beyond the range, and seams where patches meet.

Pictures are [b, height, width, 3] in [-1, 1].
"""

import numpy as np
from jaxtyping import Float, Float64

from radiance.data.datasets import DataError

Pictures = Float[np.ndarray, "b height width 3"]
ROUNDING = (2 / 255) ** 2 / 12  # the power of rounding to 8 bits


def radial_spectrum(pictures: Pictures) -> Float64[np.ndarray, " frequencies"]:
    """Mean power of all pictures and channels by distance from frequency 0.

    Entry i stands for (i + 1) cycles along the shorter side, ± ½, up to half a cycle per pixel; frequency 0, the mean of a channel, is left
    out, and so are the corners beyond. White noise of variance σ² has the power σ² everywhere. A Hann window keeps the step between
    opposite edges, which is no part of a picture, from drowning the high frequencies.
    """
    _, height, width, _ = pictures.shape
    side = min(height, width)
    if side < 4:
        raise DataError(f"Pictures of {width}×{height} are too small for a spectrum: both sides must be at least 4 pixels.")
    window = np.outer(_hann(height), _hann(width))[..., None]
    distance = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) * side
    ring = np.rint(distance).astype(int).ravel()
    power = np.zeros((height, width))
    for picture in pictures:  # one at a time, for memory
        values = picture.astype(np.float64)
        values -= (values * window).sum(axis=(0, 1)) / window.sum()
        power += np.square(np.abs(np.fft.fft2(values * window, axes=(0, 1)))).mean(axis=-1)
    power /= len(pictures) * np.square(window).sum()
    return (np.bincount(ring, power.ravel()) / np.bincount(ring))[1 : side // 2 + 1]


def _hann(n: int) -> Float64[np.ndarray, " n"]:
    return np.square(np.sin(np.pi * (np.arange(n) + 0.5) / n))


def power_error(
    generated: Float64[np.ndarray, " frequencies"], real: Float64[np.ndarray, " frequencies"]
) -> Float64[np.ndarray, " frequencies"]:
    """How much more power generated pictures have than real ones, in decibels, at each frequency of their `radial_spectrum`.

    Power far below that of rounding to 8 bits counts for nothing.
    """
    ours, theirs = (10 * np.log10(power + ROUNDING) for power in (generated, real))
    return ours - theirs


def root_mean_square(values: Float64[np.ndarray, " n"]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _size(pictures: Pictures) -> str:
    return f"{pictures.shape[2]}×{pictures.shape[1]}"


def clipping_fraction(pictures: Pictures) -> float:
    """The share of values that are not in [-1, 1], which a file would clip. The pictures must be those of the sampler, not of a file."""
    return float(1 - (np.abs(pictures) <= 1).mean())


def seam_ratio(steps: Float64[np.ndarray, " 2"]) -> float:
    """Of `seam_steps`: the step across borders relative to the one inside. 1 has no seams."""
    inside, across = steps
    if inside == 0:  # flat patches
        return 1.0 if across == 0 else float("inf")
    return float(across / inside)


def seam_steps(pictures: Pictures, patch: int) -> Float64[np.ndarray, " 2"]:
    """The mean absolute step between neighbours inside of patches, and across their borders, over rows, columns, channels and pictures.

    Raises DataError when there is no border or nothing else.
    """
    _, height, width, _ = pictures.shape
    if not 2 <= patch < max(height, width):
        raise DataError(f"Patches of {patch} pixels have no seams to measure in pictures of {_size(pictures)}.")
    totals, counts = np.zeros(2), np.zeros(2)  # inside, across
    for axis in (1, 2):
        steps = np.abs(np.diff(pictures, axis=axis)).mean(axis=tuple({0, 1, 2, 3} - {axis}), dtype=np.float64)
        across = (np.arange(1, len(steps) + 1) % patch == 0).astype(int)
        lines = pictures.shape[3 - axis]
        totals += np.bincount(across, steps, minlength=2) * lines
        counts += np.bincount(across, minlength=2) * lines
    return totals / counts


class Signals:
    """Spectrum and seams of many pictures of one size, added batch by batch."""

    def __init__(self, patch: int):
        self.patch, self.count = patch, 0
        self._totals: list[np.ndarray] = [np.zeros(()), np.zeros(2)]

    def add(self, pictures: Pictures):
        found = [radial_spectrum(pictures), seam_steps(pictures, self.patch)]
        self._totals = [total + len(pictures) * value for total, value in zip(self._totals, found)]
        self.count += len(pictures)

    @property
    def spectrum(self) -> Float64[np.ndarray, " frequencies"]:
        return self._totals[0] / self.count

    @property
    def seam(self) -> float:
        return seam_ratio(self._totals[1] / self.count)
