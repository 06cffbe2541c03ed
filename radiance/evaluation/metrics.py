"""Compute distances between two sets of feature vectors, in float64.

Axis letters: n and m are the numbers of vectors in the two sets, d that of features. Features come
from `evaluation/features.py`.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Float64

from radiance.base.errors import DataError
from radiance.base.random import random_permutation
from radiance.evaluation.features import Features

MAX_BLOCK_DISTANCES = 1 << 24  # distances in memory at a time: 128 MB
NUM_NEIGHBORS = 3  # for precision and recall, as published
NUM_SUBSETS = 10  # for KID
MIN_IMAGES = 2 * NUM_SUBSETS  # in either set


# --- Fréchet distance ----------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean and covariance of a set of vectors."""

    num_vectors: int
    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]  # unbiased: divided by n − 1


def compute_moments(blocks: Iterable[Float[np.ndarray, "_ d"]]) -> Moments:
    """Return mean and covariance of all rows, block by block (Chan et al. 1983, eq. 2.1).

    Raises:
        DataError: There are fewer than two rows.
    """
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for block in blocks:
        block = np.asarray(block, np.float64)
        if not len(block):
            continue
        block_mean = block.mean(axis=0)
        deviations, mean_difference = block - block_mean, block_mean - mean
        total = count + len(block)
        between = np.multiply.outer(mean_difference, mean_difference)
        scatter = scatter + deviations.T @ deviations + between * (count * len(block) / total)
        mean = mean + mean_difference * (len(block) / total)
        count = total
    if count < 2:
        raise DataError(f"A covariance needs at least 2 images, and there are {count}.")
    return Moments(count, mean, scatter / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance of two Gaussians with these moments.

    It is |μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½), the squared 2-Wasserstein distance (Dowson and
    Landau 1982; arXiv 1706.08500, eq. 6). Estimates from few images are too large, so only values
    of the same number of images can be compared.
    """
    # The trace of (Σa Σb)^½ is the sum of the singular values of Σa^½ Σb^½. This takes no root of
    # the product's rounding errors, so it also works for singular covariances of few vectors.
    root_product_trace = np.sum(
        scipy.linalg.svdvals(_matrix_sqrt(a.covariance) @ _matrix_sqrt(b.covariance))
    )
    mean_difference = a.mean - b.mean
    squared_distance = (
        mean_difference @ mean_difference
        + np.trace(a.covariance)
        + np.trace(b.covariance)
        - 2 * root_product_trace
    )
    return float(max(squared_distance, 0))


def _matrix_sqrt(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    eigenvalues, eigenvectors = scipy.linalg.eigh(covariance)
    return (eigenvectors * np.sqrt(np.maximum(eigenvalues, 0))) @ eigenvectors.T


# --- kernel distance -----------------------------------------------------------------------------


class KernelDistance(NamedTuple):
    """An estimate of the kernel distance."""

    value: float
    standard_error: float


def kernel_distance(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m d"],
    num_subsets: int = NUM_SUBSETS,
    seed: int = 0,
) -> KernelDistance:
    """Return the kernel inception distance, KID (arXiv 1801.01401, section 4).

    It is the squared maximum mean discrepancy under the kernel (x·y / d + 1)³. The estimate is
    unbiased for any number of vectors, so it may be negative.

    Both sets are shuffled and divided into subsets, and the value is the mean over pairs of
    subsets. The subsets are disjoint, so their values are independent and give the standard error.
    (The usual 100 draws of 1000 vectors overlap: their mean has the same expectation, but their
    standard deviation does not measure the error.)

    Args:
        x: One set.
        y: The other set.
        num_subsets: Number of subsets of each set.
        seed: Seed of the shuffling.

    Raises:
        DataError: A subset would have fewer than two vectors.
    """
    if min(len(x), len(y)) < 2 * num_subsets:
        raise DataError(
            f"KID with {num_subsets} subsets needs at least {2 * num_subsets} images in both sets, "
            f"and there are {len(x)} and {len(y)}."
        )
    subset_indices = []
    for set_index, features in enumerate((x, y)):
        rng = np.random.Generator(np.random.Philox(key=[seed, set_index]))
        order = random_permutation(rng, len(features))
        subset_indices.append(np.array_split(order, num_subsets))
    values = [squared_mmd(x[i], y[j]) for i, j in zip(*subset_indices)]
    standard_error = np.std(values, ddof=1) / np.sqrt(num_subsets)
    return KernelDistance(float(np.mean(values)), float(standard_error))


def squared_mmd(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Return the squared maximum mean discrepancy under the cubic kernel, without bias.

    Gretton et al. 2012 (JMLR 13), eq. 3.
    """
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
    """How far two sets of images cover each other."""

    precision: float  # fraction of generated images inside the manifold of real ones
    recall: float  # fraction of real images inside the manifold of generated ones


def precision_recall(
    generated: Float[np.ndarray, "n d"],
    real: Float[np.ndarray, "m d"],
    num_neighbors: int = NUM_NEIGHBORS,
) -> PrecisionRecall:
    """Return improved precision and recall (arXiv 1904.06991, section 2).

    A vector is inside the manifold of a set if it is in one of the balls around the set's vectors.
    The radius of a ball is the distance to the k-th nearest neighbor in the set.

    Args:
        generated: Features of generated images.
        real: Features of real images.
        num_neighbors: k.

    Raises:
        DataError: A set has k vectors or fewer.
    """
    if min(len(generated), len(real)) <= num_neighbors:
        raise DataError(
            f"Precision and recall with {num_neighbors} neighbors need more images than that, and "
            f"there are {len(generated)} and {len(real)}."
        )
    precision = _is_in_manifold(generated, real, num_neighbors).mean()
    recall = _is_in_manifold(real, generated, num_neighbors).mean()
    return PrecisionRecall(float(precision), float(recall))


def _is_in_manifold(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], num_neighbors: int
) -> Bool[np.ndarray, " n"]:
    """Return for every x whether it is inside the manifold of y."""
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
    """Return the k-th smallest distance of each row, without that of a vector to itself."""
    rows = np.arange(len(block))
    block[rows, start + rows] = np.inf
    return np.partition(block, k - 1, axis=1)[:, k - 1]


def _iterate_distance_blocks(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Iterator[tuple[int, Float64[np.ndarray, "b m"]]]:
    """Yield squared distances of all x to all y in blocks of rows, with the first row's index."""
    # Subtracting the mean saves |x|² + |y|² − 2 x·y from cancellation.
    center = np.mean(y, axis=0, dtype=np.float64)
    y = np.asarray(y, np.float64) - center
    squared_norms = np.square(y).sum(axis=1)
    rows_per_block = max(1, MAX_BLOCK_DISTANCES // len(y))
    for start in range(0, len(x), rows_per_block):
        block = np.asarray(x[start : start + rows_per_block], np.float64) - center
        squared = np.square(block).sum(axis=1)[:, None] + squared_norms - 2 * block @ y.T
        yield start, np.maximum(squared, 0)


# --- all metrics ---------------------------------------------------------------------------------


def compare_features(generated: Features, real: Features, extractor_name: str) -> dict[str, float]:
    """Return all distances between two sets of features, by name.

    Lower is better for the Fréchet distance and KID, higher for precision and recall.

    Args:
        generated: Features of generated images.
        real: Features of real images.
        extractor_name: Name of the extractor, which is part of the metrics' names.

    Raises:
        DataError: There are fewer than 20 images in a set.
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
