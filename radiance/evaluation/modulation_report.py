"""Format measured modulation vectors as text, a table and an HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from radiance.base.files import replace_atomically
from radiance.base.tables import format_table
from radiance.evaluation.figures import COLORS, Line, plot_lines
from radiance.evaluation.modulation_variance import (
    ConditionGrid,
    ModulationVector,
    VarianceComponents,
)
from radiance.evaluation.pages import render_charts, render_page
from radiance.model.modulation import SINGLE_VECTOR_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def format_summary(vectors: Sequence[ModulationVector], grid: ConditionGrid) -> str:
    """Return the grid and the mean R² over all vectors, as lines of text."""
    guidance = ""
    if len(grid.guidance) > 1:
        scales = ", ".join(f"{scale:g}" for scale in grid.guidance)
        guidance = f" × guidance scales {scales}"
    lines = [
        f"{len(grid.time)} times, evenly spaced from 0 (image) to 1 (noise), × "
        f"{grid.pooled_description}{guidance}."
    ]
    varying = [v.components for v in vectors if v.components.variance]
    if num_constant := len(vectors) - len(varying):
        lines.append(f"{num_constant} of the {len(vectors)} vectors are constant.")
    if varying:
        r2_time = fmean(components.r2_time for components in varying)
        r2_additive = fmean(components.r2_additive for components in varying)
        num_explained = sum(components.r2_time >= 0.99 for components in varying)
        lines.append(
            f"Mean over {len(varying)} vectors: time alone explains {r2_time:.1%} of the variance, "
            f"and a function of time plus one of {' plus one of '.join(grid.other_inputs)} "
            f"explains {r2_additive:.1%}. Time alone explains 99% or more of {num_explained} "
            "vectors."
        )
    return "\n".join(lines)


def format_vector_table(vectors: Sequence[ModulationVector]) -> str:
    """Return a table with median and minimum of R² over the blocks, for each kind of vector."""
    rows = [("layers", "vector", "blocks", "R² time", "lowest", "R² sum", "lowest", "constant")]
    for layer_type, name in dict.fromkeys((v.layer_type, v.name) for v in vectors):
        blocks = [v.components for v in vectors if (v.layer_type, v.name) == (layer_type, name)]
        rows.append(
            (
                layer_type,
                name,
                str(len(blocks)),
                *_format_median_and_minimum([components.r2_time for components in blocks]),
                *_format_median_and_minimum([components.r2_additive for components in blocks]),
                _format_constant_fraction(blocks),
            )
        )
    return format_table(rows, num_text_columns=2)


def write_modulation_report(
    path: Path, title: str, vectors: Sequence[ModulationVector], grid: ConditionGrid
):
    """Write R² of every vector as an HTML page with charts over the blocks.

    Args:
        path: File to write.
        title: Name of the model.
        vectors: All measured vectors.
        grid: Inputs on which they were measured.
    """
    summary = format_summary(vectors, grid).splitlines()
    sections = [
        f"<h1>Modulation of {html.escape(title)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in summary),
        "<p>Solid: R² of time alone. Dashed: R² of a function of time plus a function of each "
        "other input.</p>",
        render_charts(_plot_blocks(vectors)),
        "<h2>Every vector</h2>",
        _format_all_vectors(vectors),
    ]
    with replace_atomically(path) as temp_path:
        temp_path.write_text(render_page(f"Modulation of {title}", sections), "utf-8")


def _plot_blocks(vectors: Sequence[ModulationVector]) -> Iterator[Figure | None]:
    """Yield one chart of R² over the blocks for each kind of layer and part of a block."""
    parts = dict.fromkeys(
        (v.layer_type, v.name.rpartition(" ")[0]) for v in vectors if v.layer_type != "output"
    )
    for layer_type, part in parts:
        lines = []
        for color, name in zip(COLORS, SINGLE_VECTOR_NAMES):
            full_name = f"{part} {name}".strip()
            blocks = [v for v in vectors if (v.layer_type, v.name) == (layer_type, full_name)]
            r2_time = [(v.block, v.components.r2_time) for v in blocks]
            r2_additive = [(v.block, v.components.r2_additive) for v in blocks]
            lines += [Line(name, r2_time, color), Line("", r2_additive, color, "dashed")]
        yield plot_lines(f"{layer_type} {part}".strip(), "R²", lines, x_label="block")


def _format_all_vectors(vectors: Sequence[ModulationVector]) -> str:
    rows = [("layers", "block", "vector", "R² time", "R² sum", "constant")]
    for v in vectors:
        r2_time, r2_additive = f"{v.components.r2_time:.4f}", f"{v.components.r2_additive:.4f}"
        constant = _format_constant_fraction([v.components])
        rows.append((v.layer_type, str(v.block), v.name, r2_time, r2_additive, constant))
    return format_table(rows, num_text_columns=3, style="html")


def _format_median_and_minimum(values: Sequence[float]) -> tuple[str, str]:
    """Format the median and the minimum of the values that are not NaN."""
    valid = [x for x in values if x == x]
    return (f"{median(valid):.3f}", f"{min(valid):.3f}") if valid else ("–", "–")


def _format_constant_fraction(blocks: Sequence[VarianceComponents]) -> str:
    """Format the median fraction of the mean square that is independent of all inputs."""
    fractions = []
    for components in blocks:
        total = components.constant + components.variance
        fractions.append(components.constant / total if total else 1.0)
    return f"{median(fractions):.1%}"
