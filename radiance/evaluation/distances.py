"""Distances between two sets of feature vectors, in float64. Where features come from is no matter here (`evaluation/features.py`).

Axis letters: n, m vectors of either set, d features.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Float64

from radiance.data.datasets import DataError
from radiance.data.draws import shuffled

BLOCK = 1 << 24  # distances that are held at a time: 128 MB
NEIGHBOURS = 3  # of precision and recall, as published
SUBSETS = 10  # of KID


# --- Fréchet distance -------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    count: int
    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]  # unbiased: divided by count − 1


def moments(blocks: Iterable[Float[np.ndarray, "b d"]]) -> Moments:
    """Mean and covariance of all rows, a block at a time (Chan et al. 1983, eq. 2.1). Raises DataError for fewer than two rows."""
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for block in blocks:
        block = np.asarray(block, np.float64)
        if not len(block):
            continue
        centre = block.mean(axis=0)
        centred, step, total = block - centre, centre - mean, count + len(block)
        scatter = scatter + centred.T @ centred + np.multiply.outer(step, step) * (count * len(block) / total)
        mean = mean + step * (len(block) / total)
        count = total
    if count < 2:
        raise DataError(f"A covariance needs at least 2 pictures, and there are {count}.")
    return Moments(count, mean, scatter / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½): the squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982; arXiv 1706.08500, eq. 6).

    Estimated from few pictures it is too large, and the more so the fewer they are: compare only values of one count.
    """
    # The trace of (Σa Σb)^½ is the sum of the singular values of Σa^½ Σb^½. No root is taken of a rounding error of the product, so
    # that covariances of fewer vectors than features, which have no full rank, do as well as others.
    overlap = scipy.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    step = a.mean - b.mean
    return float(max(step @ step + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap, 0))


def _root(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    values, vectors = scipy.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


# --- kernel distance --------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    value: float
    error: float  # standard error


def kernel_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], subsets: int = SUBSETS, seed: int = 0) -> Estimate:
    """KID: the squared maximum mean discrepancy under (x·y / d + 1)³, unbiased at any count, so that it may fall below 0
    (arXiv 1801.01401, §4).

    Both sets are shuffled and cut into `subsets` parts; the value is the mean over the pairs of parts. They share no vector, so the
    values of parts are independent and their scatter gives the standard error. (The customary 100 draws of 1000 vectors overlap: they
    have the same expectation, but their scatter tells nothing of the error.) Raises DataError for less than two vectors a part.
    """
    if min(len(x), len(y)) < 2 * subsets:
        raise DataError(f"KID by {subsets} parts needs at least {2 * subsets} pictures of each kind, and there are {len(x)} and {len(y)}.")
    orders = (shuffled(np.random.Generator(np.random.Philox(key=[seed, side])), len(z)) for side, z in enumerate((x, y)))
    parts = (np.array_split(order, subsets) for order in orders)
    values = [squared_discrepancy(x[i], y[j]) for i, j in zip(*parts)]
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(subsets)))


def squared_discrepancy(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy under the cubic kernel (Gretton et al. 2012, eq. 3)."""
    n, m = len(x), len(y)
    within_x, within_y = (_kernel(z, z) for z in (x, y))
    alone = (within_x.sum() - np.trace(within_x)) / (n * (n - 1)) + (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(alone - 2 * _kernel(x, y).mean())


def _kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float64[np.ndarray, "n m"]:
    return (np.asarray(x, np.float64) @ np.asarray(y, np.float64).T / x.shape[1] + 1) ** 3


# --- precision and recall ---------------------------------------------------------------------------------------------


class Coverage(NamedTuple):
    precision: float  # share of generated pictures that lie among the real ones
    recall: float  # share of real pictures that lie among the generated ones


def precision_recall(generated: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"], neighbours: int = NEIGHBOURS) -> Coverage:
    """Improved precision and recall (arXiv 1904.06991, §2).

    A vector lies among the others when it is no farther from one of them than that one's k-th nearest neighbour of its own kind.
    Raises DataError when there are no k others.
    """
    if min(len(generated), len(real)) <= neighbours:
        raise DataError(
            f"Precision and recall by {neighbours} neighbours need more pictures than that, and there are {len(generated)} and {len(real)}."
        )
    inside = (_among(x, y, neighbours).mean() for x, y in ((generated, real), (real, generated)))
    return Coverage(*map(float, inside))


def _among(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], neighbours: int) -> Bool[np.ndarray, " n"]:
    radii = np.concatenate([_nearest(block, start, neighbours) for start, block in _distances(y, y)])
    return np.concatenate([(block <= radii).any(axis=1) for _, block in _distances(x, y)])


def _nearest(block: Float64[np.ndarray, "b m"], start: int, k: int) -> Float64[np.ndarray, " b"]:
    """The k-th smallest of each row, without the distance of a vector to itself."""
    rows = np.arange(len(block))
    block[rows, start + rows] = np.inf
    return np.partition(block, k - 1, axis=1)[:, k - 1]


def _distances(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Iterator[tuple[int, Float64[np.ndarray, "b m"]]]:
    """Squared distances of every x to every y, some rows at a time, with the number of the first row."""
    # About the mean, so that |x|² + |y|² − 2 x·y loses no digits to what all vectors have in common.
    centre = np.mean(y, axis=0, dtype=np.float64)
    y = np.asarray(y, np.float64) - centre
    lengths = np.square(y).sum(axis=1)
    size = max(1, BLOCK // len(y))
    for start in range(0, len(x), size):
        block = np.asarray(x[start : start + size], np.float64) - centre
        yield start, np.maximum(np.square(block).sum(axis=1)[:, None] + lengths - 2 * block @ y.T, 0)
