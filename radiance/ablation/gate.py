"""The gate of a suite: whether its planned seeds can decide the question, judged on other seeds."""

from collections.abc import Mapping

import numpy as np

from radiance.ablation.comparison import check_precondition, measure_differences
from radiance.ablation.results import Result, abbreviate
from radiance.ablation.suite import Gate, Suite
from radiance.base.errors import ConfigError
from radiance.base.tables import format_table
from radiance.evaluation.statistics import count_needed_seeds, half_width


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
        results: Results of the base and the gate's variants, on the gate's seeds.

    Raises:
        ConfigError: The base has no result or its metric is 0, or a seed diverged.
    """
    gate, num_seeds = get_gate(suite, scale), suite.scales[scale].num_seeds
    differences_by_variant, base = measure_differences(suite, results), results[suite.base]
    wanted = f"{gate.max_half_width:.1%}"
    header = ["variant", "difference", "scatter", f"half width, {num_seeds} seeds"]
    rows = [[*header, f"seeds for ±{wanted}", "passes"]]
    for variant, differences in differences_by_variant.items():
        if not np.isfinite(differences).all():
            raise ConfigError(
                f"{variant} diverged in the gate of {suite.name}: change the variant."
            )
        scatter = float(differences.std(ddof=1))
        width = half_width(scatter, num_seeds)
        rows.append(
            [
                variant,
                f"{differences.mean():+.1%}",
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
        f"What {suite.base} reaches, over the seeds:",
        _format_ranges(base),
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
        f"Code {abbreviate(base.key.commit)}, data {base.key.data}.",
    ]
    return "\n\n".join(sections) + "\n"


def _format_ranges(result: Result) -> str:
    """Return the table of the lowest and highest metrics, and losses by condition."""
    values_by_name = result.metrics | {
        f"loss, {condition}": values for condition, values in result.conditions.items()
    }
    rows = [["", "lowest", "highest"]]
    for name, values in values_by_name.items():
        if "_chance" not in name:
            rows.append([name, f"{min(values.values()):.4g}", f"{max(values.values()):.4g}"])
    return format_table(rows, style="github")
