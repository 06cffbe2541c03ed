"""The results of a suite in a page of Markdown and a figure: each arm against the base, seed by seed."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from radiance.ablation.results import Result, abbreviate
from radiance.ablation.suite import Suite
from radiance.base.errors import ConfigError
from radiance.base.tables import format_number
from radiance.evaluation.figures import plot_intervals, render_svg
from radiance.evaluation.statistics import (
    CONFIDENCE,
    Interval,
    paired_differences,
    student_interval,
)

HIGHER_IS_BETTER = ("exact",)


class Comparison(NamedTuple):
    """An arm against the base."""

    difference: Interval | None  # as a share of the base's mean; None where a seed's is not finite
    p: float  # of no difference: paired t-test, two-sided, after Holm over the arms but the control
    verdict: str  # better, worse, equal (within the margin), undecided, or diverged
    relative_steps: (
        Interval | None
    )  # of the base's steps, in which the arm reaches the base's last validation loss; None where a seed never does


def compare_arms(suite: Suite, results: Mapping[str, Result]) -> dict[str, Comparison]:
    """Every arm but the base. Raises ConfigError where the base is not among them, or its metric is nothing but 0 or not finite."""
    if suite.base not in results:
        raise ConfigError(
            f"Suite {suite.name} has no result of its base {suite.base} yet, with which the others are compared: run that arm."
        )
    base = results[suite.base]
    base_values = base.metrics[suite.metric]
    base_mean = float(np.mean(list(base_values.values())))
    if base_mean == 0:
        raise ConfigError(
            f"Suite {suite.name}: {suite.metric} of its base {suite.base} is 0 with every seed, and there is no share of that: train it longer."
        )
    if not np.isfinite(base_mean):
        raise ConfigError(
            f"Suite {suite.name}: its base {suite.base} has diverged, and nothing can be compared with it: lower its learning rate."
        )
    differences_by_arm = {
        arm: paired_differences(result.metrics[suite.metric], base_values)
        for arm, result in results.items()
        if arm != suite.base
    }
    raw_p_values = {
        arm: p_value(differences)
        for arm, differences in differences_by_arm.items()
        if np.isfinite(differences).all()
    }
    adjusted_p_values = raw_p_values | correct_holm(
        {arm: p for arm, p in raw_p_values.items() if arm != suite.control}
    )
    comparisons = {}
    for arm, differences in differences_by_arm.items():
        if arm not in raw_p_values:
            num_diverged = int((~np.isfinite(differences)).sum())
            comparisons[arm] = Comparison(
                None,
                float("nan"),
                f"diverged with {num_diverged} of {len(differences)} seeds",
                None,
            )
            continue
        interval = student_interval([difference / base_mean for difference in differences])
        verdict = decide_verdict(suite, interval, adjusted_p_values[arm])
        comparisons[arm] = Comparison(
            interval, adjusted_p_values[arm], verdict, steps_to_quality(results[arm], base)
        )
    return comparisons


def p_value(differences: Sequence[float]) -> float:
    """Of a mean of 0, two-sided."""
    if np.ptp(differences) == 0:  # as of arms that are the same in all but name
        return float(differences[0] == 0)
    return float(scipy.stats.ttest_1samp(differences, 0).pvalue)


def correct_holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values after Holm's correction (Scandinavian Journal of Statistics 6, 1979): that one of them all is below α by chance has probability α."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        adjusted[name] = highest = max(highest, min(1.0, (len(p_values) - rank) * p))
    return adjusted


def decide_verdict(suite: Suite, interval: Interval, p: float) -> str:
    is_equal = -suite.margin <= interval.low and interval.high <= suite.margin
    if p < 1 - CONFIDENCE:
        is_better = (interval.mean > 0) == (suite.metric in HIGHER_IS_BETTER)
        return ("better" if is_better else "worse") + (
            ", equal within the margin" if is_equal else ""
        )
    return "equal within the margin" if is_equal else "undecided"


def steps_to_quality(result: Result, base: Result) -> Interval | None:
    """Steps to the base's last validation loss, over the base's steps; None where some seed does not get there, or nothing was noted."""
    if not base.curve or len(base.key.seeds) < 2:
        return None
    last_step, target_losses = base.curve[-1]
    steps = [
        first_step_below(
            [(step, values[seed]) for step, values in result.curve], target_losses[seed]
        )
        for seed in base.key.seeds
    ]
    return None if None in steps else student_interval([step / last_step for step in steps])


def first_step_below(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Where a curve first falls to `goal`, between its points on a straight line."""
    previous: tuple[int, float] | None = None
    for step, value in curve:
        if value <= target:
            if previous is None:
                return float(step)
            return step - (step - previous[0]) * (target - value) / (previous[1] - value)
        previous = (step, value)
    return None


# --- the page -----------------------------------------------------------------------------------------------------------


def format_suite_report(suite: Suite, results: Mapping[str, Result]) -> str:
    comparisons, base = compare_arms(suite, results), results[suite.base]
    key, is_tuned = base.key, any(result.tuning["losses"] for result in results.values())
    sections = [
        f"# {suite.name}, scale {key.scale}",
        suite.question,
        f"Decided by {suite.metric}, over seeds {', '.join(map(str, key.seeds))}; differences are paired by seed, with {CONFIDENCE:.0%} intervals, "
        f"as shares of the base's mean; p is after Holm. Margin of equality {suite.margin:.1%}. "
        + (
            "Learning rate and average are tuned per arm."
            if is_tuned
            else "Nothing is tuned per arm: all have one learning rate and average."
        ),
        _format_arms(suite, results, comparisons),
        _format_control(suite, comparisons),
    ]
    sections += [
        f"## {suite.name}: each arm by time",
        "Mean validation loss in equal bins of time, from the image (0) to noise (1), as a share of the base's.",
        _format_bins(results, base),
    ]
    if base.conditions:
        sections += [
            f"## {suite.name}: each arm under other conditions",
            "Mean validation loss of the trained weights.",
            _format_conditions(suite, results),
        ]
    if sample_metrics := [
        name for name in base.metrics if name not in ("validation_loss", "exact")
    ]:
        sections += ["## Painted and read", _format_means(results, sample_metrics)]
    missing_arms = [arm for arm in suite.arms_at(key.scale) if arm not in results]
    if missing_arms:
        sections.append(
            f"Not run yet: {', '.join(missing_arms)}. With them p of the others may grow."
        )
    if skipped_updates := {
        arm: result.cost["skipped"] for arm, result in results.items() if result.cost["skipped"]
    }:
        skipped_text = ", ".join(f"{arm} {count}" for arm, count in skipped_updates.items())
        sections.append(
            f"Updates of all seeds that were left out because they were not finite: {skipped_text}."
        )
    devices = ", ".join(
        sorted({device for result in results.values() for device in result.environment["devices"]})
    )
    sections.append(f"Code {abbreviate(key.commit)}, data {key.data}, on {devices}.")
    return "\n\n".join(sections) + "\n"


def _format_arms(
    suite: Suite, results: Mapping[str, Result], comparisons: Mapping[str, Comparison]
) -> str:
    rows = [
        [
            "arm",
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
    for arm, result in results.items():
        values = list(result.metrics[suite.metric].values())
        mean = student_interval(values) if np.isfinite(values).all() else "not finite"
        changes = (
            " ".join(f"`{change}`" for change in suite.arms_at(result.key.scale)[arm]) or "the base"
        )
        comparison_cells = ["", "", "", ""]
        if arm in comparisons:
            comparison = comparisons[arm]
            steps_cell = (
                f"× {comparison.relative_steps}" if comparison.relative_steps else "not reached"
            )
            comparison_cells = (
                [format_percent(comparison.difference), f"{comparison.p:.2g}"]
                if comparison.difference
                else ["", ""]
            )
            comparison_cells += [comparison.verdict, steps_cell]
        cost_cells = [
            format_number(result.cost["parameters"]),
            format_number(result.cost["flops"]),
            f"{result.cost['seconds']:.0f}",
        ]
        rows.append(
            [
                f"{arm} (control)" if arm == suite.control else arm,
                changes,
                str(mean),
                *comparison_cells,
                *cost_cells,
            ]
        )
    return _format_markdown(rows)


def _format_control(suite: Suite, comparisons: Mapping[str, Comparison]) -> str:
    if suite.control not in comparisons:
        return f"The control {suite.control} has not been run: no verdict of “undecided” or “equal” can be trusted yet."
    if comparisons[suite.control].verdict.startswith("worse"):
        return f"The control {suite.control} is told from the base, so the suite can see an effect of that size."
    return f"The control {suite.control} is not told from the base: what this run leaves undecided, or calls equal, says nothing."


def _format_bins(results: Mapping[str, Result], base: Result) -> str:
    means = {
        arm: np.array([np.mean(list(values.values())) for values in result.bins])
        for arm, result in results.items()
    }
    num_bins = len(base.bins)
    rows = [["arm", *(f"{i / num_bins:g} … {(i + 1) / num_bins:g}" for i in range(num_bins))]]
    rows += [
        [arm, *(f"{value:.3f}" for value in arm_means / means[base.key.arm])]
        for arm, arm_means in means.items()
    ]
    return _format_markdown(rows)


def _format_conditions(suite: Suite, results: Mapping[str, Result]) -> str:
    conditions = list(results[suite.base].conditions)
    rows = [["trained as", "own", *conditions]]
    for arm, result in results.items():
        own_loss = float(np.mean(list(result.metrics["validation_loss"].values())))
        means = {
            condition: float(np.mean(list(values.values())))
            for condition, values in result.conditions.items()
        }
        rows.append(
            [
                arm,
                f"{own_loss:.4g}",
                *(
                    f"{means[condition]:.4g} (×{means[condition] / own_loss:.2f})"
                    if condition in means
                    else "–"
                    for condition in conditions
                ),
            ]
        )
    return _format_markdown(rows)


def _format_means(results: Mapping[str, Result], names: Sequence[str]) -> str:
    return _format_markdown(
        [
            ["arm", *names],
            *(
                [arm, *(f"{np.mean(list(result.metrics[name].values())):.3f}" for name in names)]
                for arm, result in results.items()
            ),
        ]
    )


def _format_markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)
    )


def format_percent(interval: Interval) -> str:
    return f"{interval.mean:+.1%} ({interval.low:+.1%} … {interval.high:+.1%})"


# --- the figure ---------------------------------------------------------------------------------


def draw_figure(suite: Suite, results: Mapping[str, Result]) -> str:
    """Return an SVG document with each arm's paired difference from the base and its interval.

    The band is the margin of equality, and the control is gray. Arms that diverged are left out.
    """
    percentages = {
        arm: Interval(*(100 * end for end in comparison.difference))
        for arm, comparison in compare_arms(suite, results).items()
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
