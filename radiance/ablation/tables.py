"""The results of a suite in a page of Markdown and a figure: each arm against the base, seed by seed."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from radiance.ablation.results import Result, short
from radiance.ablation.suite import Suite
from radiance.evaluation.charts import number, ticks
from radiance.evaluation.intervals import CONFIDENCE, Interval, paired_differences, student
from radiance.sections import ConfigError

HIGHER_IS_BETTER = ("exact",)


class Compared(NamedTuple):
    """An arm against the base."""

    difference: Interval | None  # as a share of the base's mean; None where a seed's is not finite
    p: float  # of no difference: paired t-test, two-sided, after Holm over the arms but the control
    verdict: str  # better, worse, equal (within the margin), undecided, or diverged
    reached: Interval | None  # of the base's steps, in which the arm reaches the base's last validation loss; None where a seed never does


def compared(suite: Suite, results: Mapping[str, Result]) -> dict[str, Compared]:
    """Every arm but the base. Raises ConfigError where the base is not among them, or its metric is nothing but 0 or not finite."""
    if suite.base not in results:
        raise ConfigError(
            f"Suite {suite.name} has no result of its base {suite.base} yet, with which the others are compared: run that arm."
        )
    base = results[suite.base]
    theirs = base.metrics[suite.metric]
    scale = float(np.mean(list(theirs.values())))
    if scale == 0:
        raise ConfigError(
            f"Suite {suite.name}: {suite.metric} of its base {suite.base} is 0 with every seed, and there is no share of that: train it longer."
        )
    if not np.isfinite(scale):
        raise ConfigError(
            f"Suite {suite.name}: its base {suite.base} has diverged, and nothing can be compared with it: lower its learning rate."
        )
    ours = {arm: paired_differences(result.metrics[suite.metric], theirs) for arm, result in results.items() if arm != suite.base}
    raw = {arm: p_value(differences) for arm, differences in ours.items() if np.isfinite(differences).all()}
    adjusted = raw | holm({arm: p for arm, p in raw.items() if arm != suite.control})
    found = {}
    for arm, differences in ours.items():
        if arm not in raw:
            lost = int((~np.isfinite(differences)).sum())
            found[arm] = Compared(None, float("nan"), f"diverged with {lost} of {len(differences)} seeds", None)
            continue
        interval = student([difference / scale for difference in differences])
        verdict = verdict_of(suite, interval, adjusted[arm])
        found[arm] = Compared(interval, adjusted[arm], verdict, steps_to_quality(results[arm], base))
    return found


def p_value(differences: Sequence[float]) -> float:
    """Of a mean of 0, two-sided."""
    if np.ptp(differences) == 0:  # as of arms that are the same in all but name
        return float(differences[0] == 0)
    return float(scipy.stats.ttest_1samp(differences, 0).pvalue)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values after Holm's correction (Scandinavian Journal of Statistics 6, 1979): that one of them all is below α by chance has probability α."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        adjusted[name] = highest = max(highest, min(1.0, (len(values) - rank) * p))
    return adjusted


def verdict_of(suite: Suite, interval: Interval, p: float) -> str:
    equal = -suite.margin <= interval.low and interval.high <= suite.margin
    if p < 1 - CONFIDENCE:
        better = (interval.mean > 0) == (suite.metric in HIGHER_IS_BETTER)
        return ("better" if better else "worse") + (", equal within the margin" if equal else "")
    return "equal within the margin" if equal else "undecided"


def steps_to_quality(ours: Result, base: Result) -> Interval | None:
    """Steps to the base's last validation loss, over the base's steps; None where some seed does not get there, or nothing was noted."""
    if not base.curve or len(base.key.seeds) < 2:
        return None
    last, goals = base.curve[-1]
    steps = [first_below([(step, values[seed]) for step, values in ours.curve], goals[seed]) for seed in base.key.seeds]
    return None if None in steps else student([step / last for step in steps])


def first_below(curve: Sequence[tuple[int, float]], goal: float) -> float | None:
    """Where a curve first falls to `goal`, between its points on a straight line."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= goal:
            if before is None:
                return float(step)
            return step - (step - before[0]) * (goal - value) / (before[1] - value)
        before = (step, value)
    return None


# --- the page -----------------------------------------------------------------------------------------------------------


def page(suite: Suite, results: Mapping[str, Result]) -> str:
    found, base = compared(suite, results), results[suite.base]
    key, tuned = base.key, any(result.tuned["losses"] for result in results.values())
    parts = [
        f"# {suite.name}, scale {key.scale}",
        suite.question,
        f"Decided by {suite.metric}, over seeds {', '.join(map(str, key.seeds))}; differences are paired by seed, with {CONFIDENCE:.0%} intervals, "
        f"as shares of the base's mean; p is after Holm. Margin of equality {suite.margin:.1%}. "
        + (
            "Learning rate and average are tuned per arm." if tuned else "Nothing is tuned per arm: all have one learning rate and average."
        ),
        _arms(suite, results, found),
        _control(suite, found),
    ]
    parts += [
        f"## {suite.name}: each arm by time",
        "Mean validation loss in equal bins of time, from the picture (0) to noise (1), as a share of the base's.",
        _bins(results, base),
    ]
    if base.views:
        parts += [
            f"## {suite.name}: each arm under other conditions",
            "Mean validation loss of the trained weights.",
            _views(suite, results),
        ]
    if extra := [name for name in base.metrics if name not in ("validation_loss", "exact")]:
        parts += ["## Painted and read", _means(results, extra)]
    missing = [arm for arm in suite.arms_at(key.scale) if arm not in results]
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}. With them p of the others may grow.")
    if skipped := {arm: result.cost["skipped"] for arm, result in results.items() if result.cost["skipped"]}:
        told = ", ".join(f"{arm} {count}" for arm, count in skipped.items())
        parts.append(f"Updates of all seeds that were left out because they were not finite: {told}.")
    devices = ", ".join(sorted({device for result in results.values() for device in result.environment["devices"]}))
    parts.append(f"Code {short(key.commit)}, data {key.data}, on {devices}.")
    return "\n\n".join(parts) + "\n"


def _arms(suite: Suite, results: Mapping[str, Result], found: Mapping[str, Compared]) -> str:
    rows = [["arm", "changes", suite.metric, "difference", "p", "verdict", "steps to quality", "parameters", "FLOP a picture", "seconds"]]
    for arm, result in results.items():
        values = list(result.metrics[suite.metric].values())
        mean = student(values) if np.isfinite(values).all() else "not finite"
        changes = " ".join(f"`{change}`" for change in suite.arms_at(result.key.scale)[arm]) or "the base"
        told = ["", "", "", ""]
        if arm in found:
            other = found[arm]
            reached = f"× {other.reached}" if other.reached else "not reached"
            told = [percent(other.difference), f"{other.p:.2g}"] if other.difference else ["", ""]
            told += [other.verdict, reached]
        cost = [number(result.cost["parameters"]), number(result.cost["flops"]), f"{result.cost['seconds']:.0f}"]
        rows.append([f"{arm} (control)" if arm == suite.control else arm, changes, str(mean), *told, *cost])
    return _markdown(rows)


def _control(suite: Suite, found: Mapping[str, Compared]) -> str:
    if suite.control not in found:
        return f"The control {suite.control} has not been run: no verdict of “undecided” or “equal” can be trusted yet."
    if found[suite.control].verdict.startswith("worse"):
        return f"The control {suite.control} is told from the base, so the suite can see an effect of that size."
    return f"The control {suite.control} is not told from the base: what this run leaves undecided, or calls equal, says nothing."


def _bins(results: Mapping[str, Result], base: Result) -> str:
    means = {arm: np.array([np.mean(list(values.values())) for values in result.bins]) for arm, result in results.items()}
    count = len(base.bins)
    rows = [["arm", *(f"{i / count:g} … {(i + 1) / count:g}" for i in range(count))]]
    rows += [[arm, *(f"{value:.3f}" for value in found / means[base.key.arm])] for arm, found in means.items()]
    return _markdown(rows)


def _views(suite: Suite, results: Mapping[str, Result]) -> str:
    views = list(results[suite.base].views)
    rows = [["trained as", "own", *views]]
    for arm, result in results.items():
        own = float(np.mean(list(result.metrics["validation_loss"].values())))
        means = {view: float(np.mean(list(values.values()))) for view, values in result.views.items()}
        rows.append([arm, f"{own:.4g}", *(f"{means[view]:.4g} (×{means[view] / own:.2f})" if view in means else "–" for view in views)])
    return _markdown(rows)


def _means(results: Mapping[str, Result], names: Sequence[str]) -> str:
    return _markdown(
        [["arm", *names], *([arm, *(f"{np.mean(list(result.metrics[n].values())):.3f}" for n in names)] for arm, result in results.items())]
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def percent(interval: Interval) -> str:
    return f"{interval.mean:+.1%} ({interval.low:+.1%} … {interval.high:+.1%})"


# --- the figure ---------------------------------------------------------------------------------------------------------

LEFT, WIDTH, ROW, TOP = 150, 640, 26, 34


def figure(suite: Suite, results: Mapping[str, Result]) -> str:
    """SVG: each arm's paired difference to the base with its interval, over the margin of equality in grey. Those that diverged have none."""
    found = compared(suite, results)
    found = {arm: other for arm, other in found.items() if other.difference}
    ends = [end for other in found.values() for end in other.difference] + [-suite.margin, suite.margin]
    low, high = min(ends) * 100, max(ends) * 100
    low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    height = TOP + ROW * len(found) + 40

    def x(share: float) -> float:
        return LEFT + (WIDTH - LEFT - 16) * (100 * share - low) / (high - low)

    bottom = height - 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="18" font-weight="bold">{html.escape(suite.name)}: {suite.metric} against {html.escape(suite.base)}, %</text>',
        f'<rect x="{x(-suite.margin):.1f}" y="{TOP}" width="{x(suite.margin) - x(-suite.margin):.1f}" height="{bottom - TOP}" fill="#ddd"/>',
    ]
    for tick in ticks(low, high):
        at = x(tick / 100)
        parts.append(f'<path d="M{at:.1f} {TOP}V{bottom}" stroke="{"#222" if tick == 0 else "#ccc"}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>')
    for row, (arm, other) in enumerate(found.items()):
        at, told = TOP + ROW * (row + 0.5), other.difference
        colour = "#888" if arm == suite.control else "#2a6fbb"
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{html.escape(arm)}</text>')
        parts.append(f'<path d="M{x(told.low):.1f} {at:.1f}H{x(told.high):.1f}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(told.mean):.1f}" cy="{at:.1f}" r="4" fill="{colour}"/>')
    parts.append(f'<text x="{LEFT}" y="{height - 6}">mean and {CONFIDENCE:.0%} interval over seeds; grey: margin of equality</text></svg>')
    return "\n".join(parts) + "\n"
