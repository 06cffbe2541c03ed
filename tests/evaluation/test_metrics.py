"""Distances of feature sets against closed forms of Gaussians, direct sums and scikit-learn."""

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from radiance.base.errors import DataError
from radiance.evaluation import metrics
from radiance.evaluation.metrics import (
    Moments,
    compute_moments,
    frechet_distance,
    kernel_distance,
    precision_recall,
    squared_mmd,
)


def gaussian(count, d, seed, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((count, d))


def covariance(d, seed):
    root = np.random.default_rng(seed).standard_normal((d, d))
    return root @ root.T


# --- Fréchet distance ----------------------------------------------------------------------------


def test_moments_of_blocks_agree_with_those_of_all_rows():
    """The mean is so large that sums of squares in float32 would lose all digits."""
    x = gaussian(500, 7, 0, shift=3000.0).astype(np.float32)
    result = compute_moments(np.split(x, [0, 1, 20, 333, 333]))
    assert result.num_vectors == 500
    np.testing.assert_allclose(result.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(
        result.covariance, np.cov(x.astype(np.float64).T), rtol=1e-9, atol=1e-9
    )


def test_frechet_distance_in_one_dimension():
    """It is (μa − μb)² + (σa − σb)²."""
    a, b = (
        Moments(9, np.array([1.0]), np.array([[4.0]])),
        Moments(9, np.array([-2.0]), np.array([[25.0]])),
    )
    assert frechet_distance(a, b) == pytest.approx(3**2 + (5 - 2) ** 2, rel=1e-12)


def test_frechet_distance_of_commuting_covariances():
    """Along each common axis, the standard deviations are subtracted."""
    axes = np.linalg.qr(covariance(6, 0))[0]
    u, v = np.random.default_rng(1).uniform(0, 5, (2, 6))
    a, b = (Moments(9, np.zeros(6), (axes * w) @ axes.T) for w in (u, v))
    assert frechet_distance(a, b) == pytest.approx(
        ((np.sqrt(u) - np.sqrt(v)) ** 2).sum(), rel=1e-10
    )


def test_frechet_distance_of_any_covariances():
    """The trace of the root follows from the eigenvalues of the asymmetric product."""
    a, b = Moments(9, np.arange(8.0), covariance(8, 0)), Moments(9, np.ones(8), covariance(8, 1))
    root = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real).sum()
    expected = (
        ((np.arange(8) - 1) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10) == frechet_distance(b, a)


def test_frechet_distance_of_samples_is_near_the_closed_form():
    root = np.linalg.cholesky(covariance(5, 3))
    x, y = gaussian(200_000, 5, 0) @ root.T, gaussian(200_000, 5, 1, shift=0.7, scale=1.5)
    exact = frechet_distance(
        Moments(9, np.zeros(5), root @ root.T), Moments(9, np.full(5, 0.7), 2.25 * np.eye(5))
    )
    assert frechet_distance(compute_moments([x]), compute_moments([y])) == pytest.approx(
        exact, rel=0.02
    )


@pytest.mark.parametrize("count", [12, 400])
def test_frechet_distance_of_a_permutation_is_zero(count):
    """Also with fewer vectors than features, where roots of rounding errors would show."""
    x = gaussian(count, 60, 0, shift=5.0)
    y = np.random.default_rng(1).permutation(x)
    assert frechet_distance(compute_moments([x]), compute_moments([y])) < 1e-9 * np.var(x) * 60


def test_frechet_distance_of_rank_one_covariances():
    """Along a and b it is |a|² + |b|² − 2 |a·b|."""
    a, b = np.random.default_rng(0).standard_normal((2, 30))
    result = frechet_distance(*(Moments(2, np.zeros(30), np.outer(v, v)) for v in (a, b)))
    assert result == pytest.approx(a @ a + b @ b - 2 * abs(a @ b), rel=1e-9)


# --- kernel distance -----------------------------------------------------------------------------


def test_mmd_agrees_with_a_direct_sum():
    x, y = gaussian(9, 4, 0), gaussian(7, 4, 1, shift=1.0)

    def kernel(u, v):
        return (u @ v / 4 + 1) ** 3

    expected = np.mean([kernel(x[i], x[j]) for i in range(9) for j in range(9) if i != j])
    expected += np.mean([kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    expected -= 2 * np.mean([kernel(u, v) for u in x for v in y])
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)


def test_the_kernel_agrees_with_scikit_learn():
    x, y = gaussian(20, 6, 0).astype(np.float32), gaussian(30, 6, 1).astype(np.float32)
    np.testing.assert_allclose(
        metrics._cubic_kernel(x, y),
        polynomial_kernel(x.astype(np.float64), y.astype(np.float64), degree=3, coef0=1),
    )


def closed_form(shift, scale, d):
    """Return the squared MMD of N(0, 1) and N(shift, scale²) in every dimension.

    It follows from E(1 + u)³ = 1 + 3 E u + 3 E u² + E u³ with u = x·y / d, and from the first three
    moments of products of independent coordinates.
    """

    def kernel(m1, s1, m2, s2):
        # x·y is a sum of d products with mean a, variance v and third central moment t.
        a = m1 * m2
        v = (m1**2 + s1**2) * (m2**2 + s2**2) - a**2
        t = (m1**3 + 3 * m1 * s1**2) * (m2**3 + 3 * m2 * s2**2) - 3 * a * v - a**3
        mean, variance, third = 1 + a, v / d, t / d**2
        return mean**3 + 3 * mean * variance + third

    return kernel(0, 1, 0, 1) + kernel(shift, scale, shift, scale) - 2 * kernel(0, 1, shift, scale)


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 1.6), (0.3, 0.7), (0.0, 1.0)])
def test_kernel_distance_is_within_its_error_of_the_closed_form(shift, scale):
    result = kernel_distance(gaussian(8000, 5, 0), gaussian(5000, 5, 1, shift, scale))
    assert abs(result.value - closed_form(shift, scale, 5)) < 3 * result.standard_error


def test_the_standard_error_agrees_with_repetitions():
    """Over 200 pairs of small sets, the mean is unbiased and errors match the deviation."""
    result = [
        kernel_distance(gaussian(60, 3, i), gaussian(40, 3, 1000 + i, shift=0.4))
        for i in range(200)
    ]
    values, errors = np.transpose(result)
    assert abs(values.mean() - closed_form(0.4, 1.0, 3)) < 3 * values.std() / np.sqrt(200)
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(), rel=0.2)


def test_subsets_follow_from_the_seed_and_use_all_vectors(monkeypatch):
    x, y = np.arange(25.0)[:, None], -np.arange(31.0)[:, None]
    assert kernel_distance(x, y) == kernel_distance(x, y) != kernel_distance(x, y, seed=1)
    subset_pairs = []
    monkeypatch.setattr(
        metrics, "squared_mmd", lambda a, b: subset_pairs.append((a, b)) or len(subset_pairs) ** 2
    )
    result = kernel_distance(x, y)
    assert len(subset_pairs) == 10
    assert result == (
        38.5,
        pytest.approx(scipy.stats.sem(np.arange(1, 11) ** 2)),
    )
    for features, subsets in zip((x, y), zip(*subset_pairs)):
        np.testing.assert_array_equal(
            np.sort(np.concatenate(subsets), axis=None), np.sort(features, axis=None)
        )


# --- precision and recall ------------------------------------------------------------------------


def test_precision_and_recall_agree_with_scikit_learn(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_BLOCK_DISTANCES", 1000)  # several blocks, the last one small
    x, y = (
        gaussian(230, 8, 0, shift=100.0, scale=0.8).astype(np.float32),
        gaussian(170, 8, 1, shift=100.4).astype(np.float32),
    )

    def fraction(a, b):
        radii = (
            NearestNeighbors(n_neighbors=4).fit(b).kneighbors(b)[0][:, 3]
        )  # each vector is its own nearest
        others = NearestNeighbors(n_neighbors=len(b)).fit(b).kneighbors(a)
        return np.mean([(d <= radii[i]).any() for d, i in zip(*others)])

    result = precision_recall(x, y)
    assert result == (fraction(x, y), fraction(y, x))
    assert 0.1 < result.recall < result.precision < 0.99


def test_a_permutation_has_full_precision_and_recall():
    x = gaussian(50, 300, 0)
    assert precision_recall(np.random.default_rng(0).permutation(x), x) == (1, 1)


def test_precision_and_recall_are_not_swapped():
    """Samples of one of two modes have full precision and half the recall."""
    modes = np.concatenate(
        [gaussian(100, 2, 0, scale=0.1), gaussian(100, 2, 1, shift=50.0, scale=0.1)]
    )
    result = precision_recall(modes[:100], modes)
    assert result.precision == 1
    assert result.recall == 0.5


def test_precision_on_a_line():
    """With one neighbor the radii of 0, 1, 3 and 7 are 1, 1, 2 and 4."""
    real = np.array([0.0, 1, 3, 7])[:, None]
    result = precision_recall(
        np.array([-1.0, -1.1, 2, 5, 11, 11.1])[:, None], real, num_neighbors=1
    )
    assert result.precision == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("measure", "count"),
    [
        (lambda x: compute_moments([x]), 1),
        (lambda x: kernel_distance(x, x), 19),
        (lambda x: precision_recall(x, x), 3),
    ],
)
def test_too_few_images_are_errors(measure, count):
    measure(gaussian(count + 1, 2, 0))
    with pytest.raises(DataError, match=f"there are {count}"):
        measure(gaussian(count, 2, 0))
