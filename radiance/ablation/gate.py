"""The gate of a suite: whether its planned seeds can decide the question, judged on other seeds."""

from collections.abc import Mapping

import numpy as np

from radiance.ablation.comparison import check_precondition
from radiance.ablation.results import Result, abbreviate
from radiance.ablation.suite import Gate, Suite
from radiance.base.errors import ConfigError
from radiance.base.tables import format_table
from radiance.evaluation.statistics import count_needed_seeds, half_width, paired_differences


def get_gate(suite: Suite, scale: str) -> Gate:
    """Return the gate of a scale. Raise ConfigError if it has none."""
    gate = suite.scales[scale].gate
    if gate is None:
        raise ConfigError(f"Suite {suite.name} has no gate at scale {scale}: leave out --gate.")
    return gate


def format_gate_report(suite: Suite, scale: str, results: Mapping[str, Result]) -> str:
    """Return the report of a gate as Markdown.

    Args:
        suite: The suite.
        scale: A scale with a gate.
        results: Results on the gate's seeds by variant.

    Raises:
        ConfigError: The base has no result, or a seed of a variant diverged.
    """
    gate, num_seeds = get_gate(suite, scale), suite.scales[scale].num_seeds
    if suite.base not in results:
        raise ConfigError(f"The gate of {suite.name} has no result of its base {suite.base} yet.")
    base = results[suite.base]
    base_values = base.metrics[suite.metric]
    base_mean = float(np.mean(list(base_values.values())))
    wanted = f"{gate.max_half_width:.1%}"
    header = ["variant", "difference", "scatter", f"half width, {num_seeds} seeds"]
    rows = [[*header, f"seeds for ±{wanted}", "passes"]]
    for variant in gate.variants:
        if variant not in results:
            continue
        differences = paired_differences(results[variant].metrics[suite.metric], base_values)
        if not np.isfinite(differences).all():
            raise ConfigError(
                f"{variant} diverged in the gate of {suite.name}: change the variant."
            )
        fractions = np.array(differences) / base_mean
        scatter = float(fractions.std(ddof=1))
        width = half_width(scatter, num_seeds)
        rows.append(
            [
                variant,
                f"{fractions.mean():+.1%}",
                f"{scatter:.1%}",
                f"{width:.1%}",
                str(count_needed_seeds(scatter, gate.max_half_width) or "over 1000"),
                "yes" if width <= gate.max_half_width else "no",
            ]
        )
    missing = [variant for variant in gate.variants if variant not in results]
    seeds = abbreviate(base.key.seeds)
    sections = [
        f"# Gate of {suite.name}, scale {scale}",
        f"Seeds {seeds}, which take part in no verdict. Metric {suite.metric} as a fraction of the "
        f"mean of {suite.base}. Scatter: standard deviation of the paired differences, with "
        f"{len(base.key.seeds) - 1} degrees of freedom. The planned {num_seeds} seeds suffice for "
        f"a variant if half of its 95% interval is at most {wanted}.",
        format_table(rows, style="github"),
        check_precondition(suite, base).sentence,
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
        f"Code {abbreviate(base.key.commit)}, data {base.key.data}.",
    ]
    return "\n\n".join(sections) + "\n"
