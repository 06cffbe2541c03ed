"""Distances between two sets of feature vectors, in float64. Where features come from is no matter here (`evaluation/features.py`).

Axis letters: n, m vectors of either set, d features.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Float64

from radiance.base.random import random_permutation
from radiance.data.datasets import DataError
from radiance.evaluation.features import Features

MAX_BLOCK_DISTANCES = 1 << 24  # distances that are held at a time: 128 MB
NUM_NEIGHBORS = 3  # of precision and recall, as published
NUM_SUBSETS = 10  # of KID


# --- Fréchet distance ----------------------------------------------------------------------------


class Moments(NamedTuple):
    num_vectors: int
    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]  # unbiased: divided by count − 1


def compute_moments(blocks: Iterable[Float[np.ndarray, "b d"]]) -> Moments:
    """Mean and covariance of all rows, a block at a time (Chan et al. 1983, eq. 2.1). Raises DataError for fewer than two rows."""
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for block in blocks:
        block = np.asarray(block, np.float64)
        if not len(block):
            continue
        block_mean = block.mean(axis=0)
        deviations, mean_difference, total = (
            block - block_mean,
            block_mean - mean,
            count + len(block),
        )
        scatter = (
            scatter
            + deviations.T @ deviations
            + np.multiply.outer(mean_difference, mean_difference) * (count * len(block) / total)
        )
        mean = mean + mean_difference * (len(block) / total)
        count = total
    if count < 2:
        raise DataError(f"A covariance needs at least 2 images, and there are {count}.")
    return Moments(count, mean, scatter / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½): the squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982; arXiv 1706.08500, eq. 6).

    Estimated from few images it is too large, and the more so the fewer they are: compare only
    values of one count.
    """
    # The trace of (Σa Σb)^½ is the sum of the singular values of Σa^½ Σb^½. No root is taken of a
    # rounding error of the product, so that covariances of fewer vectors than features, which have
    # no full rank, do as well as others.
    root_product_trace = scipy.linalg.svdvals(
        _matrix_sqrt(a.covariance) @ _matrix_sqrt(b.covariance)
    ).sum()
    mean_difference = a.mean - b.mean
    return float(
        max(
            mean_difference @ mean_difference
            + np.trace(a.covariance)
            + np.trace(b.covariance)
            - 2 * root_product_trace,
            0,
        )
    )


def _matrix_sqrt(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    eigenvalues, eigenvectors = scipy.linalg.eigh(covariance)
    return (eigenvectors * np.sqrt(np.maximum(eigenvalues, 0))) @ eigenvectors.T


# --- kernel distance -----------------------------------------------------------------------------


class KernelDistance(NamedTuple):
    value: float
    standard_error: float  # standard error


def kernel_distance(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m d"],
    num_subsets: int = NUM_SUBSETS,
    seed: int = 0,
) -> KernelDistance:
    """KID: the squared maximum mean discrepancy under (x·y / d + 1)³, unbiased at any count, so
    that it may fall below 0 (arXiv 1801.01401, §4).

    Both sets are shuffled and cut into `subsets` parts; the value is the mean over the pairs of
    parts. They share no vector, so the values of parts are independent and their scatter gives the
    standard error. (The customary 100 draws of 1000 vectors overlap: they have the same
    expectation, but their scatter tells nothing of the error.) Raises DataError for less than two
    vectors a part.
    """
    if min(len(x), len(y)) < 2 * num_subsets:
        raise DataError(
            f"KID by {num_subsets} parts needs at least {2 * num_subsets} images of each kind, and "
            f"there are {len(x)} and {len(y)}."
        )
    permutations = (
        random_permutation(
            np.random.Generator(np.random.Philox(key=[seed, set_index])), len(features)
        )
        for set_index, features in enumerate((x, y))
    )
    subset_indices = (np.array_split(order, num_subsets) for order in permutations)
    values = [squared_mmd(x[i], y[j]) for i, j in zip(*subset_indices)]
    return KernelDistance(
        float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(num_subsets))
    )


def squared_mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under the cubic kernel (Gretton et al. 2012, eq. 3)."""
    n, m = len(x), len(y)
    within_x, within_y = (_cubic_kernel(z, z) for z in (x, y))
    within_mean = (within_x.sum() - np.trace(within_x)) / (n * (n - 1)) + (
        within_y.sum() - np.trace(within_y)
    ) / (m * (m - 1))
    return float(within_mean - 2 * _cubic_kernel(x, y).mean())


def _cubic_kernel(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Float64[np.ndarray, "n m"]:
    return (np.asarray(x, np.float64) @ np.asarray(y, np.float64).T / x.shape[1] + 1) ** 3


# --- precision and recall ------------------------------------------------------------------------


class PrecisionRecall(NamedTuple):
    precision: float  # share of generated images that lie among the real ones
    recall: float  # share of real images that lie among the generated ones


def precision_recall(
    generated: Float[np.ndarray, "n d"],
    real: Float[np.ndarray, "m d"],
    num_neighbors: int = NUM_NEIGHBORS,
) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991, §2).

    A vector lies among the others when it is no farther from one of them than that one's k-th
    nearest neighbor of its own kind. Raises DataError when there are no k others.
    """
    if min(len(generated), len(real)) <= num_neighbors:
        raise DataError(
            f"Precision and recall by {num_neighbors} neighbors need more images than that, and "
            f"there are {len(generated)} and {len(real)}."
        )
    fractions = (
        _is_in_manifold(x, y, num_neighbors).mean()
        for x, y in ((generated, real), (real, generated))
    )
    return PrecisionRecall(*map(float, fractions))


def _is_in_manifold(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], num_neighbors: int
) -> Bool[np.ndarray, " n"]:
    radii = np.concatenate(
        [
            _kth_nearest_distances(block, start, num_neighbors)
            for start, block in _iterate_distance_blocks(y, y)
        ]
    )
    return np.concatenate(
        [(block <= radii).any(axis=1) for _, block in _iterate_distance_blocks(x, y)]
    )


def _kth_nearest_distances(
    block: Float64[np.ndarray, "b m"], start: int, k: int
) -> Float64[np.ndarray, " b"]:
    """The k-th smallest of each row, without the distance of a vector to itself."""
    rows = np.arange(len(block))
    block[rows, start + rows] = np.inf
    return np.partition(block, k - 1, axis=1)[:, k - 1]


def _iterate_distance_blocks(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Iterator[tuple[int, Float64[np.ndarray, "b m"]]]:
    """Squared distances of every x to every y, some rows at a time, with the number of the first row."""
    # About the mean, so that |x|² + |y|² − 2 x·y loses no digits to what all vectors have in
    # common.
    center = np.mean(y, axis=0, dtype=np.float64)
    y = np.asarray(y, np.float64) - center
    squared_norms = np.square(y).sum(axis=1)
    rows_per_block = max(1, MAX_BLOCK_DISTANCES // len(y))
    for start in range(0, len(x), rows_per_block):
        block = np.asarray(x[start : start + rows_per_block], np.float64) - center
        yield (
            start,
            np.maximum(np.square(block).sum(axis=1)[:, None] + squared_norms - 2 * block @ y.T, 0),
        )


MIN_IMAGES = 2 * NUM_SUBSETS  # images of either kind


def compare_features(generated: Features, real: Features, extractor_name: str) -> dict[str, float]:
    """The Fréchet distance and KID (lower is better), and precision and recall (higher is better), each under the name of its features.

    Raises DataError for fewer than 20 images of either kind.
    """
    kid = kernel_distance(generated, real)
    scores = precision_recall(generated, real)
    return {
        f"FD({extractor_name})": frechet_distance(
            compute_moments([generated]), compute_moments([real])
        ),
        f"KID({extractor_name})": kid.value,
        f"KID({extractor_name}) standard error": kid.standard_error,
        f"precision({extractor_name})": scores.precision,
        f"recall({extractor_name})": scores.recall,
        "generated images": len(generated),
        "real images": len(real),
    }
