"""Spectra against a direct Fourier sum and closed forms, and artifacts that must be detected."""

import numpy as np
import pytest

from radiance.base.errors import DataError
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


def test_spectrum_agrees_with_a_direct_fourier_sum():
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
                centered = values - np.average(values, weights=window)
                power += abs((centered * window * wave).sum()) ** 2 / (window**2).sum() / 6
            ring = round(8 * np.hypot(min(u, 8 - u) / 8, min(v, 12 - v) / 12))
            sums[ring] += power
            counts[ring] += 1
    np.testing.assert_allclose(radial_spectrum(images), (sums[1:5] / counts[1:5]), rtol=1e-10)


def test_white_noise_has_a_flat_spectrum():
    """The power is the variance, also in images that are not square or have another mean.

    The lowest frequencies lose power to the mean."""
    np.testing.assert_allclose(radial_spectrum(0.2 + noise(300, 16, 24, 3))[2:], 0.09, rtol=0.03)


def test_a_wave_has_its_power_at_its_frequency():
    wave = np.broadcast_to(np.sin(2 * np.pi * 5 / 32 * np.arange(32))[:, None], (1, 32, 32, 3))
    assert radial_spectrum(wave).argmax() == 5 - 1


def test_a_step_between_opposite_edges_does_not_leak():
    """Without a window, high frequencies of a ramp have 30 times the power of rounding."""
    ramp = np.broadcast_to(np.linspace(-1, 1, 64)[:, None], (1, 64, 64, 3))
    assert radial_spectrum(ramp)[10:].max() < ROUNDING_POWER


def test_errors_are_in_decibels():
    real = noise(20, 16, 16, 3)
    np.testing.assert_allclose(radial_error(2 * real, real), 20 * np.log10(2), rtol=1e-3)
    assert log_spectral_distance(real / 2, real) == pytest.approx(20 * np.log10(2), rel=2e-3)


def test_a_permutation_has_the_same_spectrum():
    real = noise(20, 16, 16, 3)
    assert log_spectral_distance(real[::-1], real) < 1e-9
    assert log_spectral_distance(np.tile(real, (3, 1, 1, 1)), real) < 1e-9


def test_blur_removes_only_high_frequencies():
    real = noise(50, 32, 32, 3)
    blurred = (real + np.roll(real, 1, 1) + np.roll(real, 1, 2) + np.roll(real, (1, 1), (1, 2))) / 4
    error = radial_error(blurred, real)
    assert abs(error[0]) < 0.5
    assert error[-1] < -5
    assert np.all(np.diff(error) < 0.3)


def test_power_below_rounding_does_not_matter():
    flat = np.zeros((2, 16, 16, 3))
    assert log_spectral_distance(flat + noise(2, 16, 16, 3, scale=1e-4), flat) < 0.02


def test_tiny_images_have_no_spectrum():
    with pytest.raises(DataError, match="too small"):
        radial_spectrum(np.zeros((1, 9, 3, 3)))


def test_values_out_of_range_and_nan_are_clipped():
    images = np.zeros((2, 5, 5, 3))
    images.flat[:6] = [1.01, -1.01, 1, -1, 5, np.nan]
    assert clipping_fraction(images) == pytest.approx(4 / 150)


# --- seams ---------------------------------------------------------------------------------------


def test_noise_has_no_seams():
    assert seam_score(noise(50, 32, 48, 3), 8) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("shape", [(1, 12, 20, 3), (3, 8, 18, 3), (1, 3, 8, 3)])
def test_seams_agree_with_a_direct_count(shape):
    """Also if the last patch is cut off, and if one side has no border."""
    images, across, inside = noise(*shape), [], []
    for b, y, x, c in np.ndindex(shape):
        for v, u in ((y + 1, x), (y, x + 1)):
            if v < shape[1] and u < shape[2]:
                (across if (y // 4, x // 4) != (v // 4, u // 4) else inside).append(
                    abs(images[b, v, u, c] - images[b, y, x, c])
                )
    assert seam_score(images, 4) == pytest.approx(np.mean(across) / np.mean(inside), rel=1e-10)


def test_patches_of_different_brightness_have_seams():
    """Seams elsewhere do not count."""
    smooth = np.broadcast_to(np.linspace(-0.5, 0.5, 64)[:, None, None], (4, 64, 64, 3))
    brightness = np.kron(noise(4, 8, 8, 1, scale=0.05), np.ones((1, 8, 8, 1)))
    assert seam_score(smooth, 8) == pytest.approx(1)
    assert seam_score(smooth + brightness, 8) > 5
    assert seam_score(smooth + np.roll(brightness, 3, (1, 2)), 8) < 0.6


def test_seams_of_flat_patches():
    assert seam_score(np.ones((1, 8, 8, 3)), 4) == 1
    assert seam_score(np.kron(noise(1, 2, 2, 3), np.ones((1, 4, 4, 1))), 4) == np.inf


@pytest.mark.parametrize("patch", [1, 8, 16])
def test_some_patch_sizes_have_no_seams(patch):
    with pytest.raises(DataError, match="no seams"):
        seam_score(np.zeros((1, 8, 8, 3)), patch)


def test_statistics_of_batches_add_up():
    images = noise(7, 16, 16, 3, scale=0.6)
    statistics = ImageStatistics(4)
    for batch in (images[:4], images[4:6], images[6:]):
        statistics.add(batch)
    np.testing.assert_allclose(statistics.spectrum, radial_spectrum(images), rtol=1e-12)
    assert statistics.seam_score == pytest.approx(seam_score(images, 4))
    np.testing.assert_allclose(
        spectrum_error(statistics.spectrum, radial_spectrum(images / 2)),
        radial_error(images, images / 2),
    )
