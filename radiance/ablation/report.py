"""The report of a suite, as a page of Markdown and a figure: each variant against the base."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from radiance.ablation.results import Result, abbreviate
from radiance.ablation.suite import Suite
from radiance.base.errors import ConfigError
from radiance.base.tables import format_number, format_table
from radiance.evaluation.figures import plot_intervals, render_svg
from radiance.evaluation.statistics import (
    CONFIDENCE,
    Interval,
    paired_differences,
    student_interval,
)

HIGHER_IS_BETTER = ("exact",)


class Comparison(NamedTuple):
    """A variant compared with the base.

    Attributes:
        difference: Paired difference as a fraction of the base's mean; None if a seed diverged.
        p: P-value of no difference: two-sided paired t-test, with Holm's correction over all
            variants except the control.
        verdict: better, worse, equal within the margin, undecided, or diverged.
        relative_steps: Steps until the variant reaches the base's last validation loss, as a
            fraction of the base's steps; None if a seed never reaches it.
    """

    difference: Interval | None
    p: float
    verdict: str
    relative_steps: Interval | None


def compare_variants(suite: Suite, results: Mapping[str, Result]) -> dict[str, Comparison]:
    """Compare every variant with the base.

    Args:
        suite: The suite.
        results: Results by variant.

    Raises:
        ConfigError: The base has no result, or its metric is 0 or not finite.
    """
    base, base_mean = _check_base(suite, results)
    differences_by_variant = {
        variant: paired_differences(result.metrics[suite.metric], base.metrics[suite.metric])
        for variant, result in results.items()
        if variant != suite.base
    }
    raw_p_values = {
        variant: p_value(differences)
        for variant, differences in differences_by_variant.items()
        if np.isfinite(differences).all()
    }
    adjusted_p_values = raw_p_values | correct_holm(
        {variant: p for variant, p in raw_p_values.items() if variant != suite.control}
    )
    comparisons = {}
    for variant, differences in differences_by_variant.items():
        if variant not in raw_p_values:
            num_diverged = int((~np.isfinite(differences)).sum())
            verdict = f"diverged with {num_diverged} of {len(differences)} seeds"
            comparisons[variant] = Comparison(None, float("nan"), verdict, None)
            continue
        interval = student_interval([difference / base_mean for difference in differences])
        verdict = decide_verdict(suite, interval, adjusted_p_values[variant])
        comparisons[variant] = Comparison(
            interval, adjusted_p_values[variant], verdict, steps_to_quality(results[variant], base)
        )
    return comparisons


def _check_base(suite: Suite, results: Mapping[str, Result]) -> tuple[Result, float]:
    """Return the result of the base and the mean of its metric."""
    if suite.base not in results:
        raise ConfigError(
            f"Suite {suite.name} has no result of its base {suite.base} yet, with which the others "
            "are compared: run that variant."
        )
    base = results[suite.base]
    base_mean = float(np.mean(list(base.metrics[suite.metric].values())))
    if base_mean == 0:
        raise ConfigError(
            f"Suite {suite.name}: {suite.metric} of its base {suite.base} is 0 with every seed, so "
            "that differences are no fractions of it: train it longer."
        )
    if not np.isfinite(base_mean):
        raise ConfigError(
            f"Suite {suite.name}: its base {suite.base} has diverged, and nothing can be compared "
            "with it: lower its learning rate."
        )
    return base, base_mean


def p_value(differences: Sequence[float]) -> float:
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


def decide_verdict(suite: Suite, interval: Interval, p: float) -> str:
    """Return the verdict on a variant: better, worse, equal within the margin, or undecided.

    Args:
        suite: The suite, with its metric and margin.
        interval: Difference from the base as a fraction of its mean.
        p: Corrected p-value of no difference.
    """
    is_equal = -suite.margin <= interval.low and interval.high <= suite.margin
    if p < 1 - CONFIDENCE:
        is_better = (interval.mean > 0) == (suite.metric in HIGHER_IS_BETTER)
        verdict = "better" if is_better else "worse"
        return f"{verdict}, equal within the margin" if is_equal else verdict
    return "equal within the margin" if is_equal else "undecided"


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


# --- the page -----------------------------------------------------------------------------------


def format_suite_report(suite: Suite, results: Mapping[str, Result]) -> str:
    """Return the report of a suite as Markdown.

    Args:
        suite: The suite.
        results: Comparable results by variant, among them the base.
    """
    comparisons, base = compare_variants(suite, results), results[suite.base]
    sections = [
        f"# {suite.name}, scale {base.key.scale}",
        suite.question,
        _describe_method(suite, results),
        _format_variants(suite, results, comparisons),
        _format_control(suite, comparisons),
        f"## {suite.name}: each variant by time",
        "Mean validation loss in equal bins of time, from the image (0) to noise (1), as a "
        "fraction of the base's.",
        _format_bins(results, base),
    ]
    if base.conditions:
        sections += [
            f"## {suite.name}: each variant under other conditions",
            "Mean validation loss of the trained weights.",
            _format_conditions(suite, results),
        ]
    if sample_metrics := [
        name for name in base.metrics if name not in ("validation_loss", "exact")
    ]:
        sections += ["## Scores of generated images", _format_means(results, sample_metrics)]
    return "\n\n".join(sections + _format_notes(suite, results)) + "\n"


def _describe_method(suite: Suite, results: Mapping[str, Result]) -> str:
    """Say how variants are compared."""
    is_tuned = any(result.tuning["losses"] for result in results.values())
    seeds = ", ".join(map(str, results[suite.base].key.seeds))
    tuning = (
        "Learning rate and average are tuned for each variant."
        if is_tuned
        else "Nothing is tuned for each variant: all have one learning rate and average."
    )
    return (
        f"Decided by {suite.metric}, over seeds {seeds}; differences are paired by seed, with "
        f"{CONFIDENCE:.0%} intervals, as fractions of the base's mean; p is after Holm's "
        f"correction. Margin of equality {suite.margin:.1%}. {tuning}"
    )


def _format_notes(suite: Suite, results: Mapping[str, Result]) -> list[str]:
    """Return notes on missing variants, skipped updates and the environment."""
    notes, key = [], results[suite.base].key
    missing_variants = [
        variant for variant in suite.variants_at(key.scale) if variant not in results
    ]
    if missing_variants:
        notes.append(
            f"Not run yet: {', '.join(missing_variants)}. With them, p of the others may increase."
        )
    skipped_steps = {variant: result.cost["skipped_steps"] for variant, result in results.items()}
    if any(skipped_steps.values()):
        skipped_text = ", ".join(
            f"{variant} {count}" for variant, count in skipped_steps.items() if count
        )
        notes.append(
            f"Updates of all seeds that were skipped because they were not finite: {skipped_text}."
        )
    devices = {device for result in results.values() for device in result.environment["devices"]}
    notes.append(
        f"Code {abbreviate(key.commit)}, data {key.data}, on {', '.join(sorted(devices))}."
    )
    return notes


def _format_variants(
    suite: Suite, results: Mapping[str, Result], comparisons: Mapping[str, Comparison]
) -> str:
    """Return the table of the variants with their verdicts."""
    rows = [
        [
            "variant",
            "changes",
            suite.metric,
            "difference",
            "p",
            "verdict",
            "steps to quality",
            "parameters",
            "FLOP an image",
            "seconds",
        ]
    ]
    for variant, result in results.items():
        values = list(result.metrics[suite.metric].values())
        changes = suite.variants_at(result.key.scale)[variant]
        rows.append(
            [
                f"{variant} (control)" if variant == suite.control else variant,
                " ".join(f"`{change}`" for change in changes) or "the base",
                str(student_interval(values) if np.isfinite(values).all() else "not finite"),
                *_format_comparison(comparisons.get(variant)),
                format_number(result.cost["parameters"]),
                format_number(result.cost["flops"]),
                f"{result.cost['seconds']:.0f}",
            ]
        )
    return format_table(rows, 2, style="github")


def _format_comparison(comparison: Comparison | None) -> list[str]:
    """Return difference, p, verdict and steps to quality; empty cells for the base."""
    if comparison is None:
        return ["", "", "", ""]
    steps = f"× {comparison.relative_steps}" if comparison.relative_steps else "not reached"
    if comparison.difference is None:
        return ["", "", comparison.verdict, steps]
    return [format_percent(comparison.difference), f"{comparison.p:.2g}", comparison.verdict, steps]


def _format_control(suite: Suite, comparisons: Mapping[str, Comparison]) -> str:
    """Say whether the suite can detect an effect of the size of the control's."""
    if suite.control not in comparisons:
        return (
            f"The control {suite.control} has not been run: no verdict of “undecided” or “equal” "
            "can be trusted yet."
        )
    if comparisons[suite.control].verdict.startswith("worse"):
        return (
            f"The control {suite.control} differs significantly from the base, so the suite can "
            "detect an effect of that size."
        )
    return (
        f"The control {suite.control} does not differ significantly from the base, so results that "
        "are undecided or equal carry no information."
    )


def _format_bins(results: Mapping[str, Result], base: Result) -> str:
    """Return the table of validation losses in bins of time."""
    means = {
        variant: np.array([np.mean(list(values.values())) for values in result.bins])
        for variant, result in results.items()
    }
    num_bins = len(base.bins)
    rows = [["variant", *(f"{i / num_bins:g} … {(i + 1) / num_bins:g}" for i in range(num_bins))]]
    for variant, variant_means in means.items():
        rows.append(
            [variant, *(f"{value:.3f}" for value in variant_means / means[base.key.variant])]
        )
    return format_table(rows, style="github")


def _format_conditions(suite: Suite, results: Mapping[str, Result]) -> str:
    """Return the table of validation losses under other evaluation conditions."""
    conditions = list(results[suite.base].conditions)
    rows = [["trained as", "own", *conditions]]
    for variant, result in results.items():
        own_loss = float(np.mean(list(result.metrics["validation_loss"].values())))
        cells = []
        for condition in conditions:
            if condition not in result.conditions:
                cells.append("–")
                continue
            loss = float(np.mean(list(result.conditions[condition].values())))
            cells.append(f"{loss:.4g} (×{loss / own_loss:.2f})")
        rows.append([variant, f"{own_loss:.4g}", *cells])
    return format_table(rows, style="github")


def _format_means(results: Mapping[str, Result], names: Sequence[str]) -> str:
    """Return the table of means of some metrics."""
    rows = [["variant", *names]]
    for variant, result in results.items():
        means = [np.mean(list(result.metrics[name].values())) for name in names]
        rows.append([variant, *(f"{mean:.3f}" for mean in means)])
    return format_table(rows, style="github")


def format_percent(interval: Interval) -> str:
    """Return an interval of fractions in percent, with signs."""
    return f"{interval.mean:+.1%} ({interval.low:+.1%} … {interval.high:+.1%})"


# --- the figure ---------------------------------------------------------------------------------


def draw_figure(suite: Suite, results: Mapping[str, Result]) -> str:
    """Return an SVG document with each variant's paired difference from the base and its interval.

    The band is the margin of equality, and the control is gray. Variants that diverged are left
    out.
    """
    percentages = {
        variant: Interval(*(100 * end for end in comparison.difference))
        for variant, comparison in compare_variants(suite, results).items()
        if comparison.difference
    }
    figure = plot_intervals(
        f"{suite.name}: {suite.metric} against {suite.base}",
        f"difference in %: mean and {CONFIDENCE:.0%} interval over seeds; band: margin of equality",
        percentages,
        100 * suite.margin,
        gray_names=[suite.control],
    )
    return render_svg(figure)
