"""The report of a suite, as a page of Markdown and a figure: each variant against the base."""

from collections.abc import Mapping, Sequence

import numpy as np

from radiance.ablation.comparison import (
    Comparison,
    check_precondition,
    compare_variants,
    is_significantly_worse,
)
from radiance.ablation.metrics import METRICS
from radiance.ablation.results import Result, abbreviate
from radiance.ablation.suite import Suite
from radiance.base.tables import format_number, format_table
from radiance.evaluation.figures import plot_intervals, render_svg
from radiance.evaluation.statistics import CONFIDENCE, Interval, student_interval


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
        _describe_credibility(suite, base),
        _format_variants(suite, results, comparisons),
        *_format_controls(suite, comparisons),
        "## Cost",
        _format_costs(suite, results, comparisons),
        f"## {suite.name}: each variant by time",
        "Mean validation loss in equal bins of time, from the image (0) to noise (1), as a "
        "fraction of the base's.",
        _format_bins(results, base),
    ]
    if base.conditions:
        sections += [
            f"## {suite.name}: each variant under other conditions",
            "Mean loss of the trained weights, and its ratio to that under their own condition.",
            _format_conditions(results, base),
        ]
    if sample_metrics := [name for name in base.metrics if "@" in name]:
        sections += [
            "## Scores of generated images",
            _format_means(results, sample_metrics),
            "Differences from the base, paired by seed. These metrics decide nothing, and their "
            "intervals are not adjusted.",
            _format_score_differences(
                results, base, [name for name in sample_metrics if "_chance" not in name]
            ),
        ]
    return "\n\n".join(sections + _format_notes(suite, results)) + "\n"


def _describe_method(suite: Suite, results: Mapping[str, Result]) -> str:
    """Say how variants are compared."""
    is_tuned = any(result.tuning["losses"] for result in results.values())
    seeds = abbreviate(results[suite.base].key.seeds)
    tuning = (
        "Learning rate and average are tuned for each variant."
        if is_tuned
        else "Nothing is tuned for each variant: all have one learning rate and average."
    )
    return (
        f"Decided by {suite.metric}: {METRICS[suite.metric].description}. Seeds {seeds}. "
        "Differences are paired by seed, and are fractions of the base's mean. Their "
        f"{CONFIDENCE:.0%} intervals are not adjusted for several comparisons. p is after Holm's "
        "correction, without the controls. "
        f"Margin of equality {suite.margin:.1%}, by two one-sided tests. "
        "Detectable: the smallest true difference that these seeds would find with a probability "
        f"of 80 %. {tuning}"
    )


def _describe_credibility(suite: Suite, base: Result) -> str:
    """Say whether the results can decide the question."""
    if base.key.scale == "smoke":
        return (
            "This scale only shows that the suite runs: its networks hardly read their captions, "
            "and its seeds were looked at before the metric was chosen. So there are no verdicts."
        )
    return check_precondition(suite, base).sentence


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
    header = ["difference", "half width", "detectable", "p", "verdict"]
    needed = f"seeds for ±{suite.margin:.1%}"
    rows = [["variant", "changes", suite.metric, *header, needed]]
    for variant, result in results.items():
        values = list(result.metrics[suite.metric].values())
        changes = suite.variants_at(result.key.scale)[variant]
        rows.append(
            [
                f"{variant} (control)" if variant in suite.controls else variant,
                " ".join(f"`{change}`" for change in changes) or "the base",
                str(student_interval(values) if np.isfinite(values).all() else "not finite"),
                *_format_comparison(comparisons.get(variant)),
            ]
        )
    return format_table(rows, 2, style="github")


def _format_comparison(comparison: Comparison | None) -> list[str]:
    """Return the cells from difference to needed seeds; they are empty for the base."""
    if comparison is None:
        return [""] * 6
    if comparison.difference is None:
        return ["", "", "", "", comparison.verdict, ""]
    difference = comparison.difference
    return [
        format_percent(difference),
        f"{(difference.high - difference.low) / 2:.1%}",
        f"{comparison.detectable:.1%}",
        f"{comparison.p:.2g}",
        comparison.verdict,
        str(comparison.needed_seeds or "over 1000"),
    ]


def _format_controls(suite: Suite, comparisons: Mapping[str, Comparison]) -> list[str]:
    """Say of each control whether it differs from the base, as it is known to do."""
    sentences = []
    for control in suite.controls:
        if control not in comparisons:
            sentences.append(f"The control {control} has not been run.")
            continue
        is_worse = is_significantly_worse(suite, comparisons[control])
        sentences.append(
            f"The control {control} {'is' if is_worse else 'is not'} significantly worse than the "
            "base."
        )
    return sentences


def _format_costs(
    suite: Suite, results: Mapping[str, Result], comparisons: Mapping[str, Comparison]
) -> str:
    """Return the table of parameters, work, time, and steps until the base's last loss."""
    rows = [["variant", "parameters", "FLOP an image", "seconds", "steps to the base's loss"]]
    for variant, result in results.items():
        steps = comparisons[variant].relative_steps if variant in comparisons else None
        rows.append(
            [
                variant,
                format_number(result.cost["parameters"]),
                format_number(result.cost["flops"]),
                f"{result.cost['seconds']:.0f}",
                "" if variant == suite.base else f"× {steps}" if steps else "not reached",
            ]
        )
    return format_table(rows, style="github")


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


def _format_conditions(results: Mapping[str, Result], base: Result) -> str:
    """Return the table of losses under evaluation conditions, the variant's own first."""
    own, *others = base.conditions
    rows = [["trained as", own, *others]]
    for variant, result in results.items():
        own_loss = float(np.mean(list(result.conditions[own].values())))
        cells = []
        for condition in others:
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


def _format_score_differences(
    results: Mapping[str, Result], base: Result, names: Sequence[str]
) -> str:
    """Return the table of paired differences of some metrics from the base."""
    rows = [["variant", *names]]
    for variant, result in results.items():
        if variant == base.key.variant:
            continue
        row = [variant]
        for name in names:
            base_values = base.metrics[name]
            differences = [result.metrics[name][seed] - base_values[seed] for seed in base_values]
            row.append(_format_difference(differences))
        rows.append(row)
    return format_table(rows, style="github")


def _format_difference(differences: Sequence[float]) -> str:
    """Return the mean of differences with its interval, with signs."""
    if not np.isfinite(differences).all():
        return "not finite"
    interval = student_interval(differences)
    return f"{interval.mean:+.3f} ({interval.low:+.3f} … {interval.high:+.3f})"


def format_percent(interval: Interval) -> str:
    """Return an interval of fractions in percent, with signs."""
    return f"{interval.mean:+.1%} ({interval.low:+.1%} … {interval.high:+.1%})"


# --- the figure ---------------------------------------------------------------------------------


def draw_figure(suite: Suite, results: Mapping[str, Result]) -> str:
    """Return an SVG document with each variant's paired difference from the base and its interval.

    The band is the margin of equality, and the controls are gray. Variants that diverged are left
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
        gray_names=suite.controls,
    )
    return render_svg(figure)
