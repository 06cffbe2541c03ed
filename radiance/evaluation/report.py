"""`report.html` of one run or several: what they were, how they learned, and what they painted; one file, no script, no network."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from radiance import config
from radiance.base.files import replace_atomically
from radiance.base.trees import count_params
from radiance.evaluation import charts
from radiance.evaluation.charts import COLORS, Line, render_line_chart
from radiance.model.transformer import make_abstract_params
from radiance.training.run_directory import RunDirectory

PAGE_CSS = """
body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1.2em;color:#222;background:#fff}
h1{margin-bottom:.2em}h2{margin-top:1.8em;border-bottom:1px solid var(--grid)}table{border-collapse:collapse;font-size:13px;display:block;overflow:auto}
td,th{padding:.2em .9em .2em 0;text-align:left;border-bottom:1px solid var(--grid);vertical-align:top;font-variant-numeric:tabular-nums}
pre{background:#8881;padding:.8em;overflow:auto;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere}
.sheets{display:flex;flex-wrap:wrap;gap:1em}.sheets figure{margin:0;flex:1 1 18em;max-width:50em;break-inside:avoid}.sheets img{width:100%;image-rendering:pixelated}
@media screen and (prefers-color-scheme:dark){body{color:#ddd;background:#16181c}}
@media print{body{font-size:11px;margin:0;max-width:none}}
"""
MAX_SHEETS = 10  # of each run
MAX_IMAGE_BYTES = 6_000_000  # of all images, before base64
SMOOTHING_FACTOR = 20  # the training loss is averaged over about a 20th of its measurements


class ReportRun(NamedTuple):
    label: str
    directory: RunDirectory
    settings: config.Config
    measurements: list[dict[str, Any]]
    color: str

    def series(self, key: str, entry: str | int | None = None) -> list[tuple[int, float]]:
        """(step, value) of every row that has it; of a list or an object the part that is named."""
        values = [(r["step"], r[key]) for r in self.measurements if r.get(key) is not None]
        return (
            values if entry is None else [(s, v[entry]) for s, v in values if _has_entry(v, entry)]
        )


def write_report(*directories: Path, out: Path | None = None) -> Path:
    """Writes the page of these runs to `out`, by default report.html of the first. Raises ConfigError when one is no run directory."""
    runs = []
    for i, path in enumerate(directories):
        directory = RunDirectory(path)
        settings = directory.read_config()
        runs.append(
            ReportRun(
                settings.name,
                directory,
                settings,
                directory.read_metrics(),
                COLORS[i % len(COLORS)],
            )
        )
    if len({run.label for run in runs}) < len(runs):
        runs = [run._replace(label=str(run.directory.path)) for run in runs]
    title = html.escape(" · ".join(run.label for run in runs))
    sections = [
        f"<h1>{title}</h1>",
        _format_overview(runs),
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(_render_curves(runs))}</div>',
        _format_validation_bins(runs),
    ]
    sections += [
        _format_samples(runs),
        _format_skipped(runs),
        _format_config(runs),
        *(_format_provenance(run) for run in runs),
    ]
    path = out or runs[0].directory.path / "report.html"
    with replace_atomically(path) as temporary_path:
        temporary_path.write_text(render_page(title, sections), "utf-8")
    return path


def render_page(title: str, sections: Sequence[str]) -> str:
    """A whole page of HTML, of which title and parts are already escaped."""
    header = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{charts.CHART_CSS}{PAGE_CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{header}</head><body>{"".join(sections)}</body></html>\n'


def format_html_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def format_row(cells, tag):
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return (
        f"<table>{format_row(header, 'th')}{''.join(format_row(row, 'td') for row in rows)}</table>"
    )


def _format_overview(runs: Sequence[ReportRun]) -> str:
    rows = []
    for run in runs:
        starts = _read_json(run.directory.path / "environment.json") or [{}]
        data = _read_json(run.directory.path / "data.json") or {}
        count = count_params(make_abstract_params(run.settings.model))
        commit = f"{(starts[-1].get('commit') or 'unknown')[:12]}{' (dirty)' if starts[-1].get('dirty') else ''}"
        devices = starts[-1].get("devices", [])
        device_names = (
            ", ".join(f"{devices.count(kind)} × {kind}" for kind in dict.fromkeys(devices))
            or "unknown"
        )
        step = max((r["step"] for r in run.measurements), default=0)
        data_hash = data.get("train", {}).get("hash", "unknown")[:12]
        rows.append(
            (
                run.label,
                f"{step} of {run.settings.train.steps}",
                f"{count / 1e6:,.1f} M",
                device_names,
                commit,
                data_hash,
            )
        )
    return format_html_table(("run", "steps", "parameters", "devices", "commit", "data"), rows)


def _render_curves(runs: Sequence[ReportRun]) -> list[str]:
    is_single = len(runs) == 1
    loss_lines = []
    for run in runs:
        loss_points, validation_color = run.series("loss"), COLORS[1] if is_single else run.color
        loss_lines.append(Line("", loss_points, run.color, "faint"))
        loss_lines.append(
            Line("training, smoothed" if is_single else run.label, _smooth(loss_points), run.color)
        )
        loss_lines.append(
            Line(
                "validation" if is_single else "",
                run.series("validation_loss"),
                validation_color,
                "dashed",
            )
        )
    curves = [
        render_line_chart(
            "Loss" if is_single else "Loss (dashed: validation)", "loss", loss_lines, log_scale=True
        )
    ]

    def add_overlay(title: str, unit: str, get_points, log_scale: bool = False):
        curves.append(
            render_line_chart(
                title,
                unit,
                [Line("" if is_single else run.label, get_points(run), run.color) for run in runs],
                log_scale,
            )
        )

    num_bins = max(
        (len(r.get("validation_bins") or ()) for run in runs for r in run.measurements), default=0
    )
    norm_names = sorted(
        {name for run in runs for r in run.measurements for name in r.get("gradient_norms") or ()}
    )
    if is_single:
        (run,) = runs
        lines = [
            Line(
                _format_bin_range(i, num_bins),
                run.series("validation_bins", i),
                f"hsl({265 - 235 * i / max(num_bins - 1, 1):.0f},65%,55%)",
            )
            for i in range(num_bins)
        ]
        curves.append(
            render_line_chart(
                "Validation loss by time (0: image, 1: noise)", "loss", lines, log_scale=True
            )
        )
    else:
        for i in range(num_bins):
            add_overlay(
                f"Validation loss, time {_format_bin_range(i, num_bins)}",
                "loss",
                lambda run, i=i: run.series("validation_bins", i),
                log_scale=True,
            )
    add_overlay("Gradient norm", "norm", lambda run: run.series("gradient_norm"), log_scale=True)
    if is_single:
        lines = [
            Line(name, runs[0].series("gradient_norms", name), COLORS[i % len(COLORS)])
            for i, name in enumerate(norm_names)
        ]
        curves.append(render_line_chart("Gradient norm by part", "norm", lines, log_scale=True))
    else:
        for name in norm_names:
            add_overlay(
                f"Gradient norm of {name}",
                "norm",
                lambda run, name=name: run.series("gradient_norms", name),
                log_scale=True,
            )
    add_overlay("Learning rate", "learning rate", lambda run: run.series("learning_rate"))
    add_overlay("Throughput", "images/s", lambda run: run.series("images_per_second"))
    add_overlay("Waiting for input", "% of the time", _input_wait_percentages)
    add_overlay("Operations", "TFLOP/s a device", lambda run: run.series("tflops_per_device"))
    add_overlay(
        "Share of the device's peak (MFU)",
        "%",
        lambda run: [(s, 100 * x) for s, x in run.series("mfu")],
    )
    add_overlay(
        "Images skipped in the interval", "images", lambda run: run.series("images_skipped")
    )
    return curves


def _format_validation_bins(runs: Sequence[ReportRun]) -> str:
    last_bins = [
        (run.label, *run.series("validation_bins")[-1])
        for run in runs
        if run.series("validation_bins")
    ]
    if not last_bins:
        return ""
    num_bins = max(len(values) for *_, values in last_bins)
    rows = [(label, step, *(f"{x:.4f}" for x in values)) for label, step, values in last_bins]
    return f"<h2>Last validation loss by time</h2>{format_html_table(('run', 'step', *(_format_bin_range(i, num_bins) for i in range(num_bins))), rows)}"


def _format_samples(runs: Sequence[ReportRun]) -> str:
    """The same steps of all runs side by side, where they painted at the same steps."""
    sheet_paths = [
        {int(p.stem): p for p in run.directory.sample_dir.glob("*.png") if p.stem.isdecimal()}
        for run in runs
    ]
    steps = thin_steps(
        sorted(set.intersection(*map(set, sheet_paths)) or set().union(*sheet_paths))
    )
    figures, previous_prompts = [], None
    for step in steps:
        step_figures, prompts = [], None
        for run, paths in zip(runs, sheet_paths):
            if step not in paths:
                continue
            try:
                image_format, data, prompts = _encode_image(
                    paths[step], MAX_IMAGE_BYTES // (len(steps) * len(runs))
                )
            except OSError:
                continue  # cut short by a kill
            caption = html.escape(f"step {step}" if len(runs) == 1 else f"{run.label}, step {step}")
            step_figures.append(
                f'<figure><img alt="samples" src="data:image/{image_format};base64,{data}"><figcaption>{caption}</figcaption></figure>'
            )
        figures += (
            step_figures
            if prompts is None or previous_prompts in (None, prompts)
            else [_format_prompts(previous_prompts), *step_figures]
        )
        previous_prompts = prompts or previous_prompts
    return (
        f'<h2>Samples</h2><div class="sheets">{"".join(figures)}{_format_prompts(previous_prompts)}</div>'
        if figures
        else ""
    )


def _format_prompts(prompts: Sequence[str] | None) -> str:
    return (
        f'<p style="flex-basis:100%">{html.escape(" · ".join(map(str, prompts)))}</p>'
        if prompts
        else ""
    )


def thin_steps(steps: Sequence[int], max_count: int = MAX_SHEETS) -> list[int]:
    """All, or the first, the last and others evenly between."""
    if len(steps) <= max_count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (max_count - 1))] for i in range(max_count)]


def _encode_image(path: Path, max_bytes: int) -> tuple[str, str, list[str] | None]:
    """Its kind, its base64 in at most so many bytes before, and the prompts of its text chunks."""
    image = Image.open(path)
    image.load()
    try:
        prompts = json.loads(image.text["prompts"])
    except (KeyError, ValueError):
        prompts = None
    image_format, data = "png", path.read_bytes()
    image = image.convert("RGB")
    while len(data) > max_bytes and min(image.size) > 8:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        image_format, data = "jpeg", buffer.getvalue()
        image = image.resize(
            (image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS
        )
    return (
        image_format,
        base64.b64encode(data).decode(),
        prompts if isinstance(prompts, list) else None,
    )


def _format_skipped(runs: Sequence[ReportRun]) -> str:
    rows = []
    for run in runs:
        data = _read_json(run.directory.path / "data.json") or {}
        for split, split_metadata in data.items():
            rows += [
                (run.label, split, reason, count)
                for reason, count in (split_metadata.get("skipped") or {}).items()
            ]
    return (
        f"<h2>Skipped data</h2>{format_html_table(('run', 'where', 'what', 'images'), rows)}"
        if rows
        else ""
    )


def _format_config(runs: Sequence[ReportRun]) -> str:
    """What differs from the defaults, then all."""
    model_names = {model: name for name, model in config.MODELS.items()}
    changes = [
        {k: new for k, (_, new) in config.differences(config.Config(), run.settings).items()}
        for run in runs
    ]
    for run, run_changes in zip(runs, changes):
        if name := model_names.get(run.settings.model):
            for key in [key for key in run_changes if key.startswith("model.")]:
                del run_changes[key]
            run_changes["model"] = name
    rows = [
        (key, *(run_changes.get(key, "default") for run_changes in changes))
        for key in dict.fromkeys(k for run_changes in changes for k in run_changes)
    ]
    details = "".join(
        f"<details><summary>All of {html.escape(r.label)}</summary>{_format_pre(config.to_json(r.settings))}</details>"
        for r in runs
    )
    return f"<h2>Config, where it is not the default</h2>{format_html_table(('setting', *(run.label for run in runs)), rows)}{details}"


def _format_provenance(run: ReportRun) -> str:
    sections = [f"<h2>How {html.escape(run.label)} was run</h2>"]
    for name in ("command.txt", "environment.json", "data.json"):
        if (path := run.directory.path / name).is_file():
            text = _format_pre(path.read_text("utf-8", errors="replace"))
            sections.append(
                text
                if name == "command.txt"
                else f"<details><summary>{name}</summary>{text}</details>"
            )
    return "".join(sections)


def _format_pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential average without the bias of its start; what is not finite stays as it is and is not averaged."""
    total = weight = 0.0
    alpha, averages = min(1.0, SMOOTHING_FACTOR / max(len(points), 1)), []
    for step, x in points:
        if isfinite(x):
            total, weight = (1 - alpha) * total + alpha * x, (1 - alpha) * weight + alpha
        averages.append((step, total / weight if isfinite(x) else x))
    return averages


def _input_wait_percentages(run: ReportRun) -> list[tuple[int, float]]:
    """Share of the time between two measurements, in percent, as far as the mean speed tells that time."""
    points, previous_step = [], 0
    for r in run.measurements:
        if "input_wait_seconds" in r and r.get("images_per_second"):
            seconds = (
                (r["step"] - previous_step) * run.settings.data.batch_size / r["images_per_second"]
            )
            points.append(
                (
                    r["step"],
                    min(100.0, 100 * r["input_wait_seconds"] / seconds)
                    if seconds
                    else float("nan"),
                )
            )
            previous_step = r["step"]
    return points


def _has_entry(value: Any, entry: str | int) -> bool:
    return entry in value if isinstance(value, Mapping) else entry < len(value)


def _format_bin_range(i: int, num_bins: int) -> str:
    return f"{i / num_bins:.1f}–{(i + 1) / num_bins:.1f}"


def _read_json(path: Path) -> Any:
    """What a file holds; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
