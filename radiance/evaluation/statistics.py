"""Confidence intervals of a mean over a few training seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from radiance.base.errors import ConfigError

CONFIDENCE = 0.95
POWER = 0.8  # probability of detecting an effect


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} … {self.high:.4g})"


def student_interval(
    values: Sequence[float] | Float[np.ndarray, " n"], confidence: float = CONFIDENCE
) -> Interval:
    """Return the mean of normally distributed values with Student's two-sided interval.

    Args:
        values: At least two finite values.
        confidence: Probability that the interval contains the true mean.

    Raises:
        ConfigError: There are fewer than two values, or one is not finite.
    """
    samples = np.asarray(values, np.float64)
    if len(samples) < 2 or not np.isfinite(samples).all():
        raise ConfigError(
            "An interval needs finite values of at least two seeds, not "
            f"{', '.join(map(str, values)) or 'none'}."
        )
    mean = float(samples.mean())
    if np.ptp(samples) == 0:  # SciPy's test divides by the standard error
        return Interval(mean, mean, mean)
    low, high = scipy.stats.ttest_1samp(samples, 0).confidence_interval(confidence)
    return Interval(mean, float(low), float(high))


def half_width(std: float, num_seeds: int) -> float:
    """Return half of Student's interval of a mean.

    Args:
        std: Standard deviation of the values.
        num_seeds: Number of values, at least 2.
    """
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, num_seeds - 1) * std / num_seeds**0.5)


def detectable_effect(std: float, num_seeds: int) -> float:
    """Return the smallest true mean that a test of a mean of 0 detects with probability POWER.

    It is the sum of two quantiles of Student's distribution, which is a few percent too small
    below five seeds.

    Args:
        std: Standard deviation of the values.
        num_seeds: Number of values, at least 2.
    """
    quantile = float(scipy.stats.t.ppf(POWER, num_seeds - 1))
    return half_width(std, num_seeds) + quantile * std / num_seeds**0.5


def count_needed_seeds(std: float, max_half_width: float) -> int | None:
    """Return the number of seeds whose interval is narrow enough; None above 1,000.

    Args:
        std: Standard deviation of the values.
        max_half_width: Half of the interval that is wanted, in the same unit.
    """
    return next((n for n in range(2, 1001) if half_width(std, n) <= max_half_width), None)


def paired_differences(
    variant_values: Mapping[int, float], control_values: Mapping[int, float]
) -> list[float]:
    """Return variant − control by seed, so that effects of data and initial weights cancel.

    Args:
        variant_values: Values by seed.
        control_values: Values of the same seeds.

    Raises:
        ConfigError: The seeds differ.
    """
    if unpaired_seeds := sorted(variant_values.keys() ^ control_values.keys()):
        raise ConfigError(
            f"Seeds {', '.join(map(str, unpaired_seeds))} have no partner: paired differences need "
            "both variants of every seed."
        )
    return [variant_values[seed] - control_values[seed] for seed in sorted(variant_values)]
