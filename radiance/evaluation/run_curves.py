"""Plot the curves of one run, or of several runs over each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite, nan
from typing import TYPE_CHECKING, Any, NamedTuple

from radiance import config
from radiance.evaluation.figures import COLORS, Line, plot_lines
from radiance.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHED_POINTS = 20  # the training loss is averaged over about a 20th of its measurements
Points = list[tuple[int, float]]  # (step, value)


class ReportRun(NamedTuple):
    """A run of a report."""

    label: str
    directory: RunDirectory
    settings: config.Config
    measurements: list[dict[str, Any]]  # rows of metrics.jsonl
    color: str

    def get_series(self, key: str) -> list[tuple[int, Any]]:
        """Return (step, value) of every row that has a value."""
        return [(row["step"], row[key]) for row in self.measurements if row.get(key) is not None]

    def get_entries(self, key: str, entry: str | int) -> Points:
        """Return (step, value) of one entry of a metric whose values are lists or objects."""
        return [
            (step, values[entry])
            for step, values in self.get_series(key)
            if _has_entry(values, entry)
        ]

    @property
    def last_step(self) -> int:
        """The step of the newest measurement."""
        return max((row["step"] for row in self.measurements), default=0)


def plot_run_curves(runs: Sequence[ReportRun]) -> Iterator[Figure | None]:
    """Yield the charts of a report: losses, gradients, speed and data.

    Measurements that never change have no chart.
    """
    yield _plot_losses(runs)
    yield from _plot_validation_bins(runs)
    yield _plot_series(runs, "Gradient norm", "norm", "gradient_norm", log_scale=True)
    yield from _plot_part_norms(runs)
    yield _plot_series(runs, "Learning rate", "learning rate", "learning_rate")
    yield _plot_series(runs, "Throughput", "images/s", "images_per_second")
    yield _plot_each(runs, "Waiting for input", "% of the time", compute_input_wait_percentages)
    yield _plot_series(runs, "Operations", "TFLOP/s per device", "tflops_per_device")
    yield _plot_each(runs, "Model FLOPs utilization", "% of the peak", _compute_mfu_percentages)
    yield _plot_series(runs, "Images skipped in the interval", "images", "images_skipped")


def _plot_losses(runs: Sequence[ReportRun]) -> Figure | None:
    """Plot the training loss, raw and smoothed, and the validation loss."""
    if len(runs) == 1:
        (run,) = runs
        losses = run.get_series("loss")
        lines = [
            Line("", losses, run.color, "faint"),
            Line("training, smoothed", smooth_points(losses), run.color),
            Line("validation", run.get_series("validation_loss"), COLORS[1], "dashed"),
        ]
        return plot_lines("Loss", "loss", lines, log_scale=True)
    lines = []
    for run in runs:
        losses = run.get_series("loss")
        lines += [
            Line("", losses, run.color, "faint"),
            Line(run.label, smooth_points(losses), run.color),
            Line("", run.get_series("validation_loss"), run.color, "dashed"),
        ]
    return plot_lines("Loss (dashed: validation)", "loss", lines, log_scale=True)


def _plot_validation_bins(runs: Sequence[ReportRun]) -> Iterator[Figure | None]:
    """Plot validation loss in bins of time: one chart for one run, else one chart per bin."""
    num_bins = max(
        (len(values) for run in runs for _, values in run.get_series("validation_bins")), default=0
    )
    if len(runs) == 1:
        lines = [
            Line(
                format_bin_range(i, num_bins),
                runs[0].get_entries("validation_bins", i),
                _bin_color(i, num_bins),
            )
            for i in range(num_bins)
        ]
        title = "Validation loss by time (0: image, 1: noise)"
        yield plot_lines(title, "loss", lines, log_scale=True)
        return
    for i in range(num_bins):
        title = f"Validation loss, time {format_bin_range(i, num_bins)}"
        yield _plot_entries(runs, title, "loss", "validation_bins", i)


def _plot_part_norms(runs: Sequence[ReportRun]) -> Iterator[Figure | None]:
    """Plot gradient norms by part of the network: one chart for one run, else one per part."""
    names = sorted(
        {name for run in runs for _, norms in run.get_series("gradient_norms") for name in norms}
    )
    if len(runs) == 1:
        lines = [
            Line(name, runs[0].get_entries("gradient_norms", name), COLORS[i % len(COLORS)])
            for i, name in enumerate(names)
        ]
        yield plot_lines("Gradient norm by part", "norm", lines, log_scale=True)
        return
    for name in names:
        yield _plot_entries(runs, f"Gradient norm of {name}", "norm", "gradient_norms", name)


def _plot_series(
    runs: Sequence[ReportRun], title: str, unit: str, key: str, log_scale: bool = False
) -> Figure | None:
    return _plot_each(runs, title, unit, lambda run: run.get_series(key), log_scale)


def _plot_entries(
    runs: Sequence[ReportRun], title: str, unit: str, key: str, entry: str | int
) -> Figure | None:
    return _plot_each(runs, title, unit, lambda run: run.get_entries(key, entry), log_scale=True)


def _plot_each(
    runs: Sequence[ReportRun],
    title: str,
    unit: str,
    get_points: Callable[[ReportRun], Points],
    log_scale: bool = False,
) -> Figure | None:
    """Plot one line per run, unless all are constant; a single run needs no legend."""
    lines = [Line("" if len(runs) == 1 else run.label, get_points(run), run.color) for run in runs]
    if all(len({y for _, y in line.points if isfinite(y)}) < 2 for line in lines):
        return None
    return plot_lines(title, unit, lines, log_scale)


def smooth_points(points: Points) -> Points:
    """Return an exponential moving average, corrected for the bias of its start.

    Values that are not finite stay as they are and do not enter the average.
    """
    total = weight = 0.0
    alpha, averages = min(1.0, SMOOTHED_POINTS / max(len(points), 1)), []
    for step, x in points:
        if isfinite(x):
            total, weight = (1 - alpha) * total + alpha * x, (1 - alpha) * weight + alpha
        averages.append((step, total / weight if isfinite(x) else x))
    return averages


def compute_input_wait_percentages(run: ReportRun) -> Points:
    """Return the time spent waiting for input, in percent of the time between two measurements.

    The time between measurements follows from the throughput.
    """
    points, previous_step = [], 0
    for row in run.measurements:
        if "input_wait_seconds" in row and row.get("images_per_second"):
            num_images = (row["step"] - previous_step) * run.settings.data.batch_size
            seconds = num_images / row["images_per_second"]
            percentage = min(100.0, 100 * row["input_wait_seconds"] / seconds) if seconds else nan
            points.append((row["step"], percentage))
            previous_step = row["step"]
    return points


def _has_entry(values: Any, entry: Any) -> bool:
    return entry in values if isinstance(values, Mapping) else entry < len(values)


def _compute_mfu_percentages(run: ReportRun) -> Points:
    return [(step, 100 * mfu) for step, mfu in run.get_series("mfu")]


def format_bin_range(i: int, num_bins: int) -> str:
    """Return the times of bin `i`, such as "0.2–0.4"."""
    return f"{i / num_bins:.1f}–{(i + 1) / num_bins:.1f}"


def _bin_color(i: int, num_bins: int) -> str:
    """Return a color between violet (image) and yellow (noise)."""
    import matplotlib
    from matplotlib.colors import to_hex

    return to_hex(matplotlib.colormaps["plasma"](0.3 + 0.55 * i / max(num_bins - 1, 1)))
