"""How far a mean over a few training seeds can be trusted."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from radiance.sections import ConfigError

CONFIDENCE = 0.95


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} … {self.high:.4g})"


def student(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean with Student's two-sided interval, which holds for values that scatter normally. Raises ConfigError for fewer than two."""
    values = _checked(values)
    mean, error = values.mean(), scipy.stats.sem(values)
    half = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error
    return Interval(float(mean), float(mean - half), float(mean + half))


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours − theirs by seed: what two arms of a seed have in common, their data and first weights, cancels.

    Raises ConfigError when the seeds are not the same.
    """
    if alone := sorted(ours.keys() ^ theirs.keys()):
        raise ConfigError(f"Seeds {', '.join(map(str, alone))} have no partner: paired differences need both arms of every seed.")
    return [ours[seed] - theirs[seed] for seed in sorted(ours)]


def _checked(values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if len(found) < 2 or not np.isfinite(found).all():
        raise ConfigError(
            f"An interval needs the finite values of at least two seeds, and these were given: {', '.join(map(str, values))}."
        )
    return found
