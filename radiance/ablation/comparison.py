"""Compare the variants of a suite with its base, by paired differences over seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from radiance.ablation.metrics import METRICS
from radiance.ablation.results import Result
from radiance.ablation.suite import Suite
from radiance.base.errors import ConfigError
from radiance.evaluation.statistics import (
    CONFIDENCE,
    Interval,
    count_needed_seeds,
    detectable_effect,
    paired_differences,
    student_interval,
)

# Two one-sided tests at the level 1 − CONFIDENCE show equality: this interval inside the margin.
EQUALITY_CONFIDENCE = 2 * CONFIDENCE - 1


class Comparison(NamedTuple):
    """A variant compared with the base.

    Attributes:
        difference: Paired difference as a fraction of the base's mean; None if a seed diverged.
        p: P-value of no difference: two-sided paired t-test, with Holm's correction over all
            variants except the controls.
        verdict: better, worse, equal within the margin, undecided, or diverged; "none" at the
            smoke scale, and where the base fails the precondition.
        detectable: The smallest true difference that these seeds detect with a probability of
            80 %, before the correction; a fraction like `difference`.
        needed_seeds: Seeds whose interval would be as narrow as the margin on each side; None if
            that takes over 1,000, or a seed diverged.
        relative_steps: Steps until the variant reaches the base's last validation loss, as a
            fraction of the base's steps; None if a seed never reaches it.
    """

    difference: Interval | None
    p: float
    verdict: str
    detectable: float
    needed_seeds: int | None
    relative_steps: Interval | None


def compare_variants(suite: Suite, results: Mapping[str, Result]) -> dict[str, Comparison]:
    """Compare every variant with the base.

    Args:
        suite: The suite.
        results: Results by variant.

    Raises:
        ConfigError: The base has no result, or its metric is 0 or not finite.
    """
    differences_by_variant, base = measure_differences(suite, results), results[suite.base]
    raw_p_values = {
        variant: p_value(differences)
        for variant, differences in differences_by_variant.items()
        if np.isfinite(differences).all()
    }
    adjusted_p_values = raw_p_values | correct_holm(
        {variant: p for variant, p in raw_p_values.items() if variant not in suite.controls}
    )
    has_verdicts = base.key.scale != "smoke" and check_precondition(suite, base).holds
    comparisons = {}
    for variant, differences in differences_by_variant.items():
        if variant not in raw_p_values:
            num_diverged = int((~np.isfinite(differences)).sum())
            verdict = f"diverged with {num_diverged} of {len(differences)} seeds"
            comparisons[variant] = Comparison(None, np.nan, verdict, np.nan, None, None)
            continue
        std, p = float(differences.std(ddof=1)), adjusted_p_values[variant]
        comparisons[variant] = Comparison(
            student_interval(differences),
            p,
            decide_verdict(suite, differences, p) if has_verdicts else "none",
            detectable_effect(std, len(differences)),
            count_needed_seeds(std, suite.margin),
            steps_to_quality(results[variant], base),
        )
    return comparisons


def measure_differences(
    suite: Suite, results: Mapping[str, Result]
) -> dict[str, Float[np.ndarray, " seeds"]]:
    """Return each variant's paired differences from the base, as fractions of the base's mean.

    Args:
        suite: The suite.
        results: Results by variant.

    Raises:
        ConfigError: The base has no result, or its metric is 0 or not finite.
    """
    if suite.base not in results:
        raise ConfigError(
            f"Suite {suite.name} has no result of its base {suite.base} yet, with which the others "
            "are compared: run that variant."
        )
    base_values = results[suite.base].metrics[suite.metric]
    base_mean = float(np.mean(list(base_values.values())))
    if base_mean == 0:
        raise ConfigError(
            f"Suite {suite.name}: {suite.metric} of its base {suite.base} is 0 with every seed, so "
            "differences cannot be given as fractions of it: train it longer."
        )
    if not np.isfinite(base_mean):
        raise ConfigError(
            f"Suite {suite.name}: its base {suite.base} has diverged, and nothing can be compared "
            "with it: lower its learning rate."
        )
    return {
        variant: np.array(paired_differences(result.metrics[suite.metric], base_values)) / base_mean
        for variant, result in results.items()
        if variant != suite.base
    }


def p_value(differences: Float[np.ndarray, " seeds"]) -> float:
    """Return the two-sided p-value of a mean of 0."""
    if np.ptp(differences) == 0:  # for example, variants that differ only in their name
        return float(differences[0] == 0)
    return float(scipy.stats.ttest_1samp(differences, 0).pvalue)


def correct_holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values after Holm's correction (Scandinavian Journal of Statistics 6, 1979).

    The probability that any of them is below α by chance is at most α.
    """
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        adjusted[name] = highest = max(highest, min(1.0, (len(p_values) - rank) * p))
    return adjusted


def decide_verdict(suite: Suite, differences: Float[np.ndarray, " seeds"], p: float) -> str:
    """Return the verdict on a variant: better, worse, equal within the margin, or undecided.

    Equality is shown by two one-sided tests (Schuirmann 1987), without a correction.

    Args:
        suite: The suite, with its metric and margin.
        differences: Differences from the base by seed, as fractions of its mean.
        p: Corrected p-value of no difference.
    """
    inner = student_interval(differences, EQUALITY_CONFIDENCE)
    is_equal = -suite.margin <= inner.low and inner.high <= suite.margin
    if p < 1 - CONFIDENCE:
        verdict = "worse" if _is_worse(suite, inner.mean) else "better"
        return f"{verdict}, equal within the margin" if is_equal else verdict
    return "equal within the margin" if is_equal else "undecided"


def is_significantly_worse(suite: Suite, comparison: Comparison) -> bool:
    """Return whether a variant is worse than the base at the level 1 − CONFIDENCE."""
    if comparison.difference is None:
        return False
    return comparison.p < 1 - CONFIDENCE and _is_worse(suite, comparison.difference.mean)


def _is_worse(suite: Suite, difference: float) -> bool:
    """Return whether a difference from the base is one for the worse."""
    return (difference > 0) != METRICS[suite.metric].higher_is_better


class PreconditionCheck(NamedTuple):
    """Whether the base of a suite reaches what a comparison needs.

    Attributes:
        holds: Whether every seed reaches the minimum.
        sentence: The values, in words.
    """

    holds: bool
    sentence: str


def check_precondition(suite: Suite, base: Result) -> PreconditionCheck:
    """Check the precondition of a scale by the result of its base."""
    precondition = suite.scales[base.key.scale].precondition
    if precondition is None:
        return PreconditionCheck(True, "No precondition.")
    values = base.metrics[precondition.metric].values()
    holds = all(value >= precondition.minimum for value in values)
    return PreconditionCheck(
        holds,
        f"Precondition {precondition.metric} ≥ {precondition.minimum:g} of {suite.base} with every "
        f"seed: {'holds' if holds else 'FAILS, so there are no verdicts'} "
        f"({min(values):.3f} … {max(values):.3f}).",
    )


def steps_to_quality(result: Result, base: Result) -> Interval | None:
    """Return the steps until the base's last validation loss, as a fraction of the base's steps.

    None if a seed does not reach it, or if losses during training were not recorded.
    """
    if not base.curve or len(base.key.seeds) < 2:
        return None
    last_step, target_losses = base.curve[-1]
    fractions = []
    for seed in base.key.seeds:
        curve = [(step, values[seed]) for step, values in result.curve]
        step = first_step_below(curve, target_losses[seed])
        if step is None:
            return None
        fractions.append(step / last_step)
    return student_interval(fractions)


def first_step_below(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Return the step at which a curve first falls to `target`, with linear interpolation."""
    previous: tuple[int, float] | None = None
    for step, value in curve:
        if value <= target:
            if previous is None:
                return float(step)
            return step - (step - previous[0]) * (target - value) / (previous[1] - value)
        previous = (step, value)
    return None
