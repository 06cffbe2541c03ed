"""Plot runs, images and the results of suites, for reports and notebooks.

Every function returns a figure of its own, without matplotlib's global state. Backgrounds are
transparent and axes gray, so that figures can be read on light and dark pages. matplotlib is
imported on first use.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from math import ceil, isfinite, nan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from radiance.base.images import make_contact_sheet, to_image
from radiance.base.tables import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from radiance.evaluation.statistics import Interval

# Colors of medium lightness, for light and dark pages.
COLORS = (
    "#3b82c4", "#d9663a", "#3a9d6a", "#a066c4", "#b8860b", "#cc4f7b", "#3a9aa8", "#8a8a3a",
)  # fmt: skip
GRAY = "#808080"
GRID_COLOR = "#80808040"
IMAGE_GAP = 1  # pixels between the images of a grid
MAX_POINTS = 1000  # of a line; longer lines keep the lowest and highest point of each stretch
MAX_MARKED_POINTS = 30  # lines with at most so many points have markers
CHART_SIZE = (5.2, 2.6)  # inches


class Line(NamedTuple):
    """A line of a chart."""

    name: str  # in the legend; "" leaves the line out
    points: Sequence[tuple[float, float]]
    color: str = COLORS[0]
    style: str = ""  # "", "faint" or "dashed"


def plot_lines(
    title: str,
    y_label: str,
    lines: Sequence[Line],
    log_scale: bool = False,
    x_label: str = "step",
) -> Figure | None:
    """Plot values over steps, or over another axis that starts at 0.

    Args:
        title: Title of the chart.
        y_label: Quantity or unit of the values.
        lines: Lines to plot. Values that are not finite, or not positive on a logarithmic axis,
            leave a gap.
        log_scale: Make the axis of values logarithmic.
        x_label: Quantity of the other axis.

    Returns:
        The figure, or None if no line has a value to plot.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    lines = [line._replace(points=_insert_gaps(line.points, log_scale)) for line in lines]
    lines = [line for line in lines if any(isfinite(y) for _, y in line.points)]
    values = [y for line in lines for _, y in line.points if isfinite(y)]
    if not values:
        return None
    figure, axes = _make_axes(title, CHART_SIZE)
    for index, line in enumerate(lines):
        _add_line(axes, line, f"line{index}")
    axes.set_xlabel(x_label, color=GRAY, fontsize=8)
    axes.set_ylabel(y_label, color=GRAY, fontsize=8)
    axes.set_xlim(0, max(1.0, *(x for line in lines for x, _ in line.points)))
    if log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif min(values) >= 0:
        axes.set_ylim(0, 1.04 * max(values) or 0.1)
    number_format = FuncFormatter(lambda value, _: format_number(value))
    axes.xaxis.set_major_formatter(number_format)
    axes.yaxis.set_major_formatter(number_format)
    handles = [artist for artist, line in zip(axes.lines, lines) if line.name]
    if handles:
        _add_legend(figure, handles)
    return figure


def plot_intervals(
    title: str,
    x_label: str,
    intervals: Mapping[str, Interval],
    margin: float,
    gray_names: Sequence[str] = (),
) -> Figure:
    """Plot intervals below each other, over a band of values that count as equal to 0.

    Args:
        title: Title of the chart.
        x_label: Quantity of the intervals.
        intervals: Intervals by name, from top to bottom.
        margin: Half the width of the band.
        gray_names: Names whose intervals are gray, such as the control's.
    """
    figure, axes = _make_axes(title, (6.4, 0.9 + 0.28 * max(len(intervals), 1)))
    axes.axvspan(-margin, margin, color=GRID_COLOR, linewidth=0)
    axes.axvline(0, color=GRAY, linewidth=0.8)
    for row, (name, interval) in enumerate(intervals.items()):
        color = GRAY if name in gray_names else COLORS[0]
        (line,) = axes.plot([interval.low, interval.high], [row, row], color=color, linewidth=1.6)
        line.set_gid(f"interval{row}")
        axes.plot([interval.mean], [row], "o", color=color, markersize=5)
    _label_ticks(axes.yaxis, range(len(intervals)), [*intervals], color=GRAY, fontsize=8)
    axes.set_ylim(max(len(intervals), 1) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(x_label, color=GRAY, fontsize=8)
    return figure


def show_figure(figure: Figure, description: str) -> None:
    """Display a figure in a notebook, with a text for readers who do not see it.

    Args:
        figure: The figure, which is closed.
        description: What the figure shows.
    """
    from IPython.display import Image as NotebookImage  # pyright: ignore[reportMissingImports]
    from IPython.display import display  # pyright: ignore[reportMissingImports]
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    display(NotebookImage(buffer.getvalue(), alt=description))


def plot_image_grid(
    images: Sequence[Image.Image | Float[np.ndarray, "height width 3"]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    image_inches: float = 0.6,
) -> Figure:
    """Plot images in a grid with labels of its rows and columns; pixels stay square.

    Args:
        images: Pillow images, or arrays with values in [-1, 1], row by row.
        rows: Labels of the rows.
        columns: Labels of the columns.
        title: Title of the grid.
        image_inches: Width of an image.

    Raises:
        ValueError: The number of images is not rows times columns.
    """
    if len(images) != len(rows) * len(columns):
        raise ValueError(
            f"{len(rows)} rows of {len(columns)} columns need {len(rows) * len(columns)} images, "
            f"not {len(images)}."
        )
    pil_images = [to_image(x) if isinstance(x, np.ndarray) else x for x in images]
    sheet = make_contact_sheet(pil_images, len(columns), IMAGE_GAP)
    width = max(image.width for image in pil_images)
    height = max(image.height for image in pil_images)
    size = (image_inches * len(columns), image_inches * len(rows) * height / width)
    figure, axes = _make_axes(title, (size[0] + 1.2, size[1] + 0.8))
    axes.imshow(sheet, interpolation="nearest")
    x_positions = IMAGE_GAP + width / 2 - 0.5 + (width + IMAGE_GAP) * np.arange(len(columns))
    y_positions = IMAGE_GAP + height / 2 - 0.5 + (height + IMAGE_GAP) * np.arange(len(rows))
    _label_ticks(axes.xaxis, x_positions, columns, color=GRAY, fontsize=8)
    _label_ticks(axes.yaxis, y_positions, rows, color=GRAY, fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


# --- SVG -----------------------------------------------------------------------------------------


def render_svg(figure: Figure) -> str:
    """Return a figure as an SVG document; the same figure gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "radiance", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()


def render_svg_element(figure: Figure) -> str:
    """Return a figure as an SVG element inside HTML, where namespaces are implied."""
    document = render_svg(figure)
    element = document[document.index("<svg") :]
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", element, count=2)


# --- parts of a figure ---------------------------------------------------------------------------


def _make_axes(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(GRAY)
    axes.tick_params(which="both", colors=GRAY, labelsize=8)
    axes.grid(color=GRID_COLOR, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, color=GRAY, fontsize=9, parse_math=False)
    return figure, axes


def _add_line(axes: Axes, line: Line, element_id: str):
    is_marked = len(line.points) <= MAX_MARKED_POINTS and line.style != "faint"
    (artist,) = axes.plot(
        *zip(*_downsample(line.points)),
        color=line.color,
        linewidth=1.2,
        alpha=0.35 if line.style == "faint" else 1,
        linestyle="dashed" if line.style == "dashed" else "solid",
        marker="o" if is_marked else "",
        markersize=3,
        label=line.name,
    )
    artist.set_gid(element_id)


def _add_legend(figure: Figure, handles: Sequence[Any]):
    longest_name = max(len(line.get_label()) for line in handles)
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, min(len(handles), 80 // (longest_name + 8))),
        frameon=False,
        fontsize=8,
        labelcolor=GRAY,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label_ticks(axis: Any, positions: Any, labels: Sequence[str], **style: Any):
    axis.set_ticks(positions, labels, **style)
    for label in axis.get_ticklabels():
        label.set_parse_math(False)


def _insert_gaps(
    points: Sequence[tuple[float, float]], log_scale: bool
) -> list[tuple[float, float]]:
    """Replace values that cannot be plotted by NaN."""
    return [(x, y if isfinite(y) and (y > 0 or not log_scale) else nan) for x, y in points]


def _downsample(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return at most `MAX_POINTS` points: the lowest and highest of each stretch."""
    if len(points) <= MAX_POINTS:
        return points
    stretch_length, extremes = ceil(2 * len(points) / MAX_POINTS), []
    for start in range(0, len(points), stretch_length):
        stretch = points[start : start + stretch_length]
        finite_points = [point for point in stretch if isfinite(point[1])]
        if not finite_points:
            extremes.append((stretch[0][0], nan))
            continue
        lowest = min(finite_points, key=lambda point: point[1])
        highest = max(finite_points, key=lambda point: point[1])
        extremes += sorted({lowest, highest})
    return extremes
