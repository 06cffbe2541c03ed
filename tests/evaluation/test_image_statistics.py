"""Spectra against a direct Fourier sum and closed forms, and faults that were put in and are found."""

import numpy as np
import pytest

from radiance.data.datasets import DataError
from radiance.evaluation.image_statistics import (
    ROUNDING_POWER,
    ImageStatistics,
    clipping_fraction,
    radial_spectrum,
    root_mean_square,
    seam_differences,
    seam_ratio,
    spectrum_error,
)


def noise(*shape, seed=0, scale=0.3):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def radial_error(generated, real):
    return spectrum_error(radial_spectrum(generated), radial_spectrum(real))


def log_spectral_distance(generated, real):
    return root_mean_square(radial_error(generated, real))


def seam_score(images, patch):
    return seam_ratio(seam_differences(images, patch))


def test_a_direct_fourier_sum():
    images = noise(2, 8, 12, 3) + np.linspace(-1, 1, 12)[:, None]
    window = np.outer(
        np.sin(np.pi * np.arange(0.5, 8) / 8) ** 2, np.sin(np.pi * np.arange(0.5, 12) / 12) ** 2
    )
    sums, counts = np.zeros(20), np.zeros(20)
    for u in range(8):
        for v in range(12):
            wave = np.exp(-2j * np.pi * (u * np.arange(8)[:, None] / 8 + v * np.arange(12) / 12))
            power = 0.0
            for values in images.transpose(0, 3, 1, 2).reshape(-1, 8, 12):
                centred = values - np.average(values, weights=window)
                power += abs((centred * window * wave).sum()) ** 2 / (window**2).sum() / 6
            ring = round(8 * np.hypot(min(u, 8 - u) / 8, min(v, 12 - v) / 12))
            sums[ring] += power
            counts[ring] += 1
    np.testing.assert_allclose(radial_spectrum(images), (sums[1:5] / counts[1:5]), rtol=1e-10)


def test_white_noise_is_flat():
    """At its variance, and also in images that are not square and not centered; the lowest frequencies give to the mean."""
    np.testing.assert_allclose(radial_spectrum(0.2 + noise(300, 16, 24, 3))[2:], 0.09, rtol=0.03)


def test_a_wave_is_found_at_its_frequency():
    wave = np.broadcast_to(np.sin(2 * np.pi * 5 / 32 * np.arange(32))[:, None], (1, 32, 32, 3))
    assert radial_spectrum(wave).argmax() == 5 - 1


def test_edges_do_not_leak():
    """A ramp steps from edge to edge, and has no high frequencies all the same: without a window they would be 30 times the rounding."""
    ramp = np.broadcast_to(np.linspace(-1, 1, 64)[:, None], (1, 64, 64, 3))
    assert radial_spectrum(ramp)[10:].max() < ROUNDING_POWER


def test_power_counts_in_decibels():
    real = noise(20, 16, 16, 3)
    np.testing.assert_allclose(radial_error(2 * real, real), 20 * np.log10(2), rtol=1e-3)
    assert log_spectral_distance(real / 2, real) == pytest.approx(20 * np.log10(2), rel=2e-3)


def test_a_shuffle_has_the_same_spectrum():
    real = noise(20, 16, 16, 3)
    assert log_spectral_distance(real[::-1], real) < 1e-9
    assert log_spectral_distance(np.tile(real, (3, 1, 1, 1)), real) < 1e-9  # and any number of them


def test_blur_loses_high_frequencies_alone():
    real = noise(50, 32, 32, 3)
    blurred = (real + np.roll(real, 1, 1) + np.roll(real, 1, 2) + np.roll(real, (1, 1), (1, 2))) / 4
    error = radial_error(blurred, real)
    assert abs(error[0]) < 0.5
    assert error[-1] < -5
    assert np.all(np.diff(error) < 0.3)


def test_less_than_a_rounding_counts_for_nothing():
    flat = np.zeros((2, 16, 16, 3))
    assert log_spectral_distance(flat + noise(2, 16, 16, 3, scale=1e-4), flat) < 0.02


def test_images_that_have_no_spectrum():
    with pytest.raises(DataError, match="too small"):
        radial_spectrum(np.zeros((1, 9, 3, 3)))


def test_clipping():
    """The ends of the range belong to it; what is no number does not."""
    images = np.zeros((2, 5, 5, 3))
    images.flat[:6] = [1.01, -1.01, 1, -1, 5, np.nan]
    assert clipping_fraction(images) == pytest.approx(4 / 150)


# --- seams ------------------------------------------------------------------------------------------------------------


def test_noise_has_no_seams():
    assert seam_score(noise(50, 32, 48, 3), 8) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("shape", [(1, 12, 20, 3), (3, 8, 18, 3), (1, 3, 8, 3)])
def test_a_direct_count(shape):
    """Also where the last patch is cut off, and where one side has no border."""
    images, across, inside = noise(*shape), [], []
    for b, y, x, c in np.ndindex(shape):
        for v, u in ((y + 1, x), (y, x + 1)):
            if v < shape[1] and u < shape[2]:
                (across if (y // 4, x // 4) != (v // 4, u // 4) else inside).append(
                    abs(images[b, v, u, c] - images[b, y, x, c])
                )
    assert seam_score(images, 4) == pytest.approx(np.mean(across) / np.mean(inside), rel=1e-10)


def test_a_planted_seam_is_found():
    """Patches of one brightness more or less than their image."""
    smooth = np.broadcast_to(np.linspace(-0.5, 0.5, 64)[:, None, None], (4, 64, 64, 3))
    brightness = np.kron(noise(4, 8, 8, 1, scale=0.05), np.ones((1, 8, 8, 1)))
    assert seam_score(smooth, 8) == pytest.approx(1)
    assert seam_score(smooth + brightness, 8) > 5
    assert (
        seam_score(smooth + np.roll(brightness, 3, (1, 2)), 8) < 0.6
    )  # seams elsewhere are no patches' seams


def test_flat_patches():
    assert seam_score(np.ones((1, 8, 8, 3)), 4) == 1
    assert seam_score(np.kron(noise(1, 2, 2, 3), np.ones((1, 4, 4, 1))), 4) == np.inf


@pytest.mark.parametrize("patch", [1, 8, 16])
def test_no_seams_to_measure(patch):
    with pytest.raises(DataError, match="no seams"):
        seam_score(np.zeros((1, 8, 8, 3)), patch)


def test_batches_add_up():
    images = noise(7, 16, 16, 3, scale=0.6)
    signals = ImageStatistics(4)
    for part in (images[:4], images[4:6], images[6:]):
        signals.add(part)
    np.testing.assert_allclose(signals.spectrum, radial_spectrum(images), rtol=1e-12)
    assert signals.seam_score == pytest.approx(seam_score(images, 4))
    np.testing.assert_allclose(
        radial_error(signals.spectrum, radial_spectrum(images / 2)),
        radial_error(images, images / 2),
    )
