"""How far a mean over a few training seeds can be trusted."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from radiance.base.errors import ConfigError

CONFIDENCE = 0.95


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} … {self.high:.4g})"


def student_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean with Student's two-sided interval, which holds for values that scatter normally. Raises ConfigError for fewer than two."""
    values = _check_values(values)
    mean, standard_error = values.mean(), scipy.stats.sem(values)
    margin = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * standard_error
    return Interval(float(mean), float(mean - margin), float(mean + margin))


def paired_differences(
    arm_values: Mapping[int, float], control_values: Mapping[int, float]
) -> list[float]:
    """Ours − theirs by seed: what two arms of a seed have in common, their data and first weights, cancels.

    Raises ConfigError when the seeds are not the same.
    """
    if unpaired_seeds := sorted(arm_values.keys() ^ control_values.keys()):
        raise ConfigError(
            f"Seeds {', '.join(map(str, unpaired_seeds))} have no partner: paired differences need both arms of every seed."
        )
    return [arm_values[seed] - control_values[seed] for seed in sorted(arm_values)]


def _check_values(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if len(array) < 2 or not np.isfinite(array).all():
        raise ConfigError(
            f"An interval needs the finite values of at least two seeds, and these were given: {', '.join(map(str, values))}."
        )
    return array
