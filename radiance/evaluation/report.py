"""Write the report of one run or several: curves, samples, settings and provenance."""

import base64
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from radiance import config
from radiance.base.files import replace_atomically
from radiance.base.json_files import parse_json
from radiance.base.tables import format_table
from radiance.base.trees import count_params
from radiance.data.decode import DECODE_ERRORS
from radiance.evaluation.figures import COLORS
from radiance.evaluation.pages import render_charts, render_page
from radiance.evaluation.run_curves import ReportRun, format_bin_range, plot_run_curves
from radiance.model.transformer import make_abstract_params
from radiance.training.metrics_file import describe_damage, read_metrics_file
from radiance.training.run_directory import RunDirectory

MAX_SHEETS = 10  # contact sheets per run
MAX_IMAGE_BYTES = 6_000_000  # of all images together, before base64


def write_report(*directories: Path, out: Path | None = None) -> Path:
    """Write the report of one or more runs.

    Args:
        *directories: Run directories.
        out: File to write; by default report.html in the first run directory.

    Returns:
        The path of the report.

    Raises:
        ConfigError: One of the directories is not a run directory.
    """
    runs = [_read_run(path, COLORS[i % len(COLORS)]) for i, path in enumerate(directories)]
    if len({run.label for run in runs}) < len(runs):
        runs = [run._replace(label=str(run.directory.path)) for run in runs]
    title = " · ".join(run.label for run in runs)
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        _format_overview(runs),
        _format_samples(runs),
        "<h2>Curves</h2>",
        render_charts(plot_run_curves(runs)),
        _format_validation_bins(runs),
        _format_skipped(runs),
        _format_config(runs),
        *map(_format_provenance, runs),
    ]
    path = out or runs[0].directory.path / "report.html"
    with replace_atomically(path) as temp_path:
        temp_path.write_text(render_page(title, sections), "utf-8")
    return path


def _read_run(path: Path, color: str) -> ReportRun:
    directory = RunDirectory(path)
    settings = directory.read_config()
    rows, damaged_lines = read_metrics_file(directory.metrics_path)
    if damaged_lines:
        print(f"radiance: {path}: {describe_damage(damaged_lines)}.", file=sys.stderr)
    return ReportRun(settings.name, directory, settings, rows, color)


def _format_overview(runs: Sequence[ReportRun]) -> str:
    rows = [("run", "steps", "parameters", "devices", "commit", "data")]
    for run in runs:
        newest = _read_newest_start(run.directory.path / "environment.json")
        data = _read_data(run.directory.path / "data.json")
        num_params = count_params(make_abstract_params(run.settings.model))
        commit = str(newest.get("commit") or "unknown")[:12]
        rows.append(
            (
                run.label,
                f"{run.last_step} of {run.settings.train.steps}",
                f"{num_params / 1e6:,.1f} M",
                _format_devices(newest.get("devices", [])),
                f"{commit} (dirty)" if newest.get("dirty") else commit,
                str(data.get("train", {}).get("hash", "unknown"))[:12],
            )
        )
    return _format_text_table(rows)


def _format_devices(devices: Any) -> str:
    if not isinstance(devices, list) or not all(isinstance(kind, str) for kind in devices):
        return "unknown"
    counts = [f"{devices.count(kind)} × {kind}" for kind in dict.fromkeys(devices)]
    return ", ".join(counts) or "unknown"


def _format_validation_bins(runs: Sequence[ReportRun]) -> str:
    """Format the last validation loss in bins of time."""
    last_bins = {}
    for run in runs:
        if series := run.get_series("validation_bins"):
            last_bins[run.label] = series[-1]
    if not last_bins:
        return ""
    num_bins = max(len(losses) for _, losses in last_bins.values())
    rows = [("run", "step", *(format_bin_range(i, num_bins) for i in range(num_bins)))]
    for label, (step, losses) in last_bins.items():
        cells = [f"{loss:.4f}" for loss in losses]
        rows.append((label, str(step), *cells, *[""] * (num_bins - len(cells))))
    return f"<h2>Last validation loss by time</h2>{_format_text_table(rows)}"


def _format_skipped(runs: Sequence[ReportRun]) -> str:
    """Format the numbers of images that were left out of the data, by reason."""
    rows = [("run", "split", "reason", "images")]
    for run in runs:
        for split, metadata in _read_data(run.directory.path / "data.json").items():
            skipped = metadata.get("skipped")
            for reason, count in skipped.items() if isinstance(skipped, dict) else ():
                rows.append((run.label, split, reason, count))
    return f"<h2>Skipped data</h2>{_format_text_table(rows)}" if len(rows) > 1 else ""


# --- samples -------------------------------------------------------------------------------------


def _format_samples(runs: Sequence[ReportRun]) -> str:
    """Show contact sheets of the same steps of all runs, with their prompts below."""
    sheet_paths = [
        {int(p.stem): p for p in run.directory.sample_dir.glob("*.png") if p.stem.isdecimal()}
        for run in runs
    ]
    common_steps = set.intersection(*map(set, sheet_paths)) or set().union(*sheet_paths)
    steps = thin_steps(sorted(common_steps))
    max_bytes = MAX_IMAGE_BYTES // max(1, len(steps) * len(runs))
    figures, previous_prompts = [], None
    for step in steps:
        step_figures, prompts = [], None
        for run, paths in zip(runs, sheet_paths):
            try:
                image_format, data, prompts = _encode_image(paths[step], max_bytes)
            except (*DECODE_ERRORS, Image.DecompressionBombError):
                continue  # the run has no sheet of this step, or one that was cut off by a kill
            caption = f"step {step}" if len(runs) == 1 else f"{run.label}, step {step}"
            step_figures.append(
                f'<figure><img alt="samples" src="data:image/{image_format};base64,{data}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        if prompts is not None and previous_prompts not in (None, prompts):
            figures.append(_format_prompts(previous_prompts))
        figures += step_figures
        previous_prompts = prompts or previous_prompts
    if not figures:
        return ""
    sheets = "".join([*figures, _format_prompts(previous_prompts)])
    return f'<h2>Samples</h2><div class="sheets">{sheets}</div>'


def _format_prompts(prompts: Sequence[str] | None) -> str:
    if not prompts:
        return ""
    text = html.escape(" · ".join(map(str, prompts)))
    return f'<p style="flex-basis:100%">{text}</p>'


def thin_steps(steps: Sequence[int], max_count: int = MAX_SHEETS) -> list[int]:
    """Return all steps, or the first, the last and others evenly spaced between them."""
    if len(steps) <= max_count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (max_count - 1))] for i in range(max_count)]


def _encode_image(path: Path, max_bytes: int) -> tuple[str, str, list[str] | None]:
    """Return format, data (base64 of at most `max_bytes` bytes) and prompts of a PNG file."""
    with Image.open(path, formats=["PNG"]) as sheet:
        image = sheet.convert("RGB")
        try:
            prompts = parse_json(sheet.info["prompts"])
        except (KeyError, ValueError):
            prompts = None
    image_format, data = "png", path.read_bytes()
    while len(data) > max_bytes and min(image.size) > 8:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        image_format, data = "jpeg", buffer.getvalue()
        smaller_size = image.width * 3 // 4, image.height * 3 // 4
        image = image.resize(smaller_size, Image.Resampling.LANCZOS)
    encoded = base64.b64encode(data).decode()
    return image_format, encoded, prompts if isinstance(prompts, list) else None


# --- settings and provenance ---------------------------------------------------------------------


def _format_config(runs: Sequence[ReportRun]) -> str:
    """Format a table of settings that differ from the defaults, and all settings folded away."""
    changes = [_changed_settings(run.settings) for run in runs]
    rows = [("setting", *(run.label for run in runs))]
    for key in dict.fromkeys(key for run_changes in changes for key in run_changes):
        rows.append((key, *(str(run_changes.get(key, "default")) for run_changes in changes)))
    details = "".join(
        f"<details><summary>All of {html.escape(run.label)}</summary>"
        f"{_format_preformatted(config.to_json(run.settings))}</details>"
        for run in runs
    )
    return f"<h2>Settings that differ from the defaults</h2>{_format_text_table(rows)}{details}"


def _changed_settings(settings: config.Config) -> dict[str, Any]:
    """Return the settings that differ from the defaults; a named model is one setting."""
    changes = {
        key: value for key, (_, value) in config.differences(config.Config(), settings).items()
    }
    model_names = {model: name for name, model in config.MODELS.items()}
    if name := model_names.get(settings.model):
        changes = {key: x for key, x in changes.items() if not key.startswith("model.")}
        changes["model"] = name
    return changes


def _format_provenance(run: ReportRun) -> str:
    """Format command, environment and data of a run."""
    sections = [f"<h2>How {html.escape(run.label)} was run</h2>"]
    for name in ("command.txt", "environment.json", "data.json"):
        if not (path := run.directory.path / name).is_file():
            continue
        text = _format_preformatted(path.read_text("utf-8", errors="replace"))
        if name != "command.txt":
            text = f"<details><summary>{name}</summary>{text}</details>"
        sections.append(text)
    return "".join(sections)


def _format_preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _format_text_table(rows: Sequence[Sequence[Any]]) -> str:
    return format_table(rows, num_text_columns=len(rows[0]), style="html")


def _read_newest_start(path: Path) -> dict[str, Any]:
    """Return the last environment of a run; an empty one if the file is missing or damaged."""
    starts = _read_json(path)
    is_valid = isinstance(starts, list) and starts and isinstance(starts[-1], dict)
    return starts[-1] if is_valid else {}


def _read_data(path: Path) -> dict[str, dict[str, Any]]:
    """Return the identities of the data of a run, without those that are damaged."""
    data = _read_json(path)
    items = data.items() if isinstance(data, dict) else ()
    return {name: value for name, value in items if isinstance(value, dict)}


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is missing or damaged."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
