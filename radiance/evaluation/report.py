"""`report.html` of one run or several: what they were, how they learned, and what they painted; one file, no script, no network."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import jax
from PIL import Image

from radiance import config
from radiance.evaluation import charts
from radiance.evaluation.charts import COLOURS, Line, line_chart
from radiance.model.transformer import abstract
from radiance.training.directory import RunDirectory
from radiance.weights.files import replacing

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1.2em;color:#222;background:#fff}
h1{margin-bottom:.2em}h2{margin-top:1.8em;border-bottom:1px solid var(--grid)}table{border-collapse:collapse;font-size:13px;display:block;overflow:auto}
td,th{padding:.2em .9em .2em 0;text-align:left;border-bottom:1px solid var(--grid);vertical-align:top;font-variant-numeric:tabular-nums}
pre{background:#8881;padding:.8em;overflow:auto;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere}
.sheets{display:flex;flex-wrap:wrap;gap:1em}.sheets figure{margin:0;flex:1 1 18em;max-width:50em;break-inside:avoid}.sheets img{width:100%;image-rendering:pixelated}
@media screen and (prefers-color-scheme:dark){body{color:#ddd;background:#16181c}}
@media print{body{font-size:11px;margin:0;max-width:none}}
"""
SHEETS = 10  # of each run
BYTES = 6_000_000  # of all pictures, before base64
SMOOTH = 20  # the training loss is averaged over about a 20th of its measurements


class Run(NamedTuple):
    label: str
    directory: RunDirectory
    settings: config.Config
    rows: list[dict[str, Any]]
    colour: str

    def series(self, key: str, part: str | int | None = None) -> list[tuple[int, float]]:
        """(step, value) of every row that has it; of a list or an object the part that is named."""
        values = [(r["step"], r[key]) for r in self.rows if r.get(key) is not None]
        return values if part is None else [(s, v[part]) for s, v in values if _has(v, part)]


def write_report(*directories: Path, out: Path | None = None) -> Path:
    """Writes the page of these runs to `out`, by default report.html of the first. Raises ConfigError when one is no run directory."""
    runs = []
    for i, path in enumerate(directories):
        directory = RunDirectory(path)
        settings = directory.read_config()
        runs.append(Run(settings.name, directory, settings, directory.read_metrics(), COLOURS[i % len(COLOURS)]))
    if len({run.label for run in runs}) < len(runs):
        runs = [run._replace(label=str(run.directory.path)) for run in runs]
    title = html.escape(" · ".join(run.label for run in runs))
    parts = [f"<h1>{title}</h1>", _header(runs), "<h2>Curves</h2>", f'<div class="charts">{"".join(_curves(runs))}</div>', _bins(runs)]
    parts += [_samples(runs), _skipped(runs), _config(runs), *(_origin(run) for run in runs)]
    path = out or runs[0].directory.path / "report.html"
    with replacing(path) as part:
        part.write_text(page(title, parts), "utf-8")
    return path


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of HTML, of which title and parts are already escaped."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{charts.STYLE}{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells, tag):
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _header(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        starts = _json(run.directory.path / "environment.json") or [{}]
        data = _json(run.directory.path / "data.json") or {}
        count = sum(x.size for x in jax.tree.leaves(abstract(run.settings.model)))
        commit = f"{(starts[-1].get('commit') or 'unknown')[:12]}{' (dirty)' if starts[-1].get('dirty') else ''}"
        devices = starts[-1].get("devices", [])
        told = ", ".join(f"{devices.count(kind)} × {kind}" for kind in dict.fromkeys(devices)) or "unknown"
        step = max((r["step"] for r in run.rows), default=0)
        hashes = data.get("train", {}).get("hash", "unknown")[:12]
        rows.append((run.label, f"{step} of {run.settings.train.steps}", f"{count / 1e6:,.1f} M", told, commit, hashes))
    return table(("run", "steps", "parameters", "devices", "commit", "data"), rows)


def _curves(runs: Sequence[Run]) -> list[str]:
    alone = len(runs) == 1
    losses = []
    for run in runs:
        raw, other = run.series("loss"), COLOURS[1] if alone else run.colour
        losses.append(Line("", raw, run.colour, "faint"))
        losses.append(Line("training, smoothed" if alone else run.label, _smoothed(raw), run.colour))
        losses.append(Line("validation" if alone else "", run.series("validation_loss"), other, "dashed"))
    found = [line_chart("Loss" if alone else "Loss (dashed: validation)", "loss", losses, log=True)]

    def overlay(title: str, unit: str, values, log: bool = False):
        found.append(line_chart(title, unit, [Line("" if alone else run.label, values(run), run.colour) for run in runs], log))

    bins = max((len(r.get("validation_bins") or ()) for run in runs for r in run.rows), default=0)
    names = sorted({name for run in runs for r in run.rows for name in r.get("gradient_norms") or ()})
    if alone:
        (run,) = runs
        lines = [
            Line(_bin(i, bins), run.series("validation_bins", i), f"hsl({265 - 235 * i / max(bins - 1, 1):.0f},65%,55%)")
            for i in range(bins)
        ]
        found.append(line_chart("Validation loss by time (0: picture, 1: noise)", "loss", lines, log=True))
    else:
        for i in range(bins):
            overlay(f"Validation loss, time {_bin(i, bins)}", "loss", lambda run, i=i: run.series("validation_bins", i), log=True)
    overlay("Gradient norm", "norm", lambda run: run.series("gradient_norm"), log=True)
    if alone:
        lines = [Line(name, runs[0].series("gradient_norms", name), COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)]
        found.append(line_chart("Gradient norm by part", "norm", lines, log=True))
    else:
        for name in names:
            overlay(f"Gradient norm of {name}", "norm", lambda run, name=name: run.series("gradient_norms", name), log=True)
    overlay("Learning rate", "learning rate", lambda run: run.series("learning_rate"))
    overlay("Throughput", "pictures/s", lambda run: run.series("pictures_per_second"))
    overlay("Waiting for input", "% of the time", _waiting)
    overlay("Operations", "TFLOP/s a device", lambda run: run.series("tflops_per_device"))
    overlay("Share of the device's peak (MFU)", "%", lambda run: [(s, 100 * x) for s, x in run.series("mfu")])
    overlay("Pictures skipped in the interval", "pictures", lambda run: run.series("pictures_skipped"))
    return found


def _bins(runs: Sequence[Run]) -> str:
    last = [(run.label, *run.series("validation_bins")[-1]) for run in runs if run.series("validation_bins")]
    if not last:
        return ""
    count = max(len(values) for *_, values in last)
    rows = [(label, step, *(f"{x:.4f}" for x in values)) for label, step, values in last]
    return f"<h2>Last validation loss by time</h2>{table(('run', 'step', *(_bin(i, count) for i in range(count))), rows)}"


def _samples(runs: Sequence[Run]) -> str:
    """The same steps of all runs side by side, where they painted at the same steps."""
    files = [{int(p.stem): p for p in run.directory.samples.glob("*.png") if p.stem.isdecimal()} for run in runs]
    chosen = thinned(sorted(set.intersection(*map(set, files)) or set().union(*files)))
    found, before = [], None
    for step in chosen:
        row, prompts = [], None
        for run, paths in zip(runs, files):
            if step not in paths:
                continue
            try:
                kind, data, prompts = _embedded(paths[step], BYTES // (len(chosen) * len(runs)))
            except OSError:
                continue  # cut short by a kill
            caption = html.escape(f"step {step}" if len(runs) == 1 else f"{run.label}, step {step}")
            row.append(f'<figure><img alt="samples" src="data:image/{kind};base64,{data}"><figcaption>{caption}</figcaption></figure>')
        found += row if prompts is None or before in (None, prompts) else [_prompts(before), *row]
        before = prompts or before
    return f'<h2>Samples</h2><div class="sheets">{"".join(found)}{_prompts(before)}</div>' if found else ""


def _prompts(prompts: Sequence[str] | None) -> str:
    return f'<p style="flex-basis:100%">{html.escape(" · ".join(map(str, prompts)))}</p>' if prompts else ""


def thinned(steps: Sequence[int], most: int = SHEETS) -> list[int]:
    """All, or the first, the last and others evenly between."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _embedded(path: Path, most: int) -> tuple[str, str, list[str] | None]:
    """Its kind, its base64 in at most so many bytes before, and the prompts of its text chunks."""
    picture = Image.open(path)
    picture.load()
    try:
        prompts = json.loads(picture.text["prompts"])
    except (KeyError, ValueError):
        prompts = None
    kind, data = "png", path.read_bytes()
    picture = picture.convert("RGB")
    while len(data) > most and min(picture.size) > 8:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        kind, data = "jpeg", buffer.getvalue()
        picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.LANCZOS)
    return kind, base64.b64encode(data).decode(), prompts if isinstance(prompts, list) else None


def _skipped(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        data = _json(run.directory.path / "data.json") or {}
        for split, told in data.items():
            rows += [(run.label, split, kind, count) for kind, count in (told.get("skipped") or {}).items()]
    return f"<h2>Skipped data</h2>{table(('run', 'where', 'what', 'pictures'), rows)}" if rows else ""


def _config(runs: Sequence[Run]) -> str:
    """What differs from the defaults, then all."""
    named = {model: name for name, model in config.MODELS.items()}
    changed = [{k: new for k, (_, new) in config.differences(config.Config(), run.settings).items()} for run in runs]
    for run, found in zip(runs, changed):
        if name := named.get(run.settings.model):
            for key in [key for key in found if key.startswith("model.")]:
                del found[key]
            found["model"] = name
    rows = [(key, *(found.get(key, "default") for found in changed)) for key in dict.fromkeys(k for found in changed for k in found)]
    full = "".join(f"<details><summary>All of {html.escape(r.label)}</summary>{_pre(config.to_json(r.settings))}</details>" for r in runs)
    return f"<h2>Config, where it is not the default</h2>{table(('setting', *(run.label for run in runs)), rows)}{full}"


def _origin(run: Run) -> str:
    found = [f"<h2>How {html.escape(run.label)} was run</h2>"]
    for name in ("command.txt", "environment.json", "data.json"):
        if (file := run.directory.path / name).is_file():
            text = _pre(file.read_text("utf-8", errors="replace"))
            found.append(text if name == "command.txt" else f"<details><summary>{name}</summary>{text}</details>")
    return "".join(found)


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential average without the bias of its start; what is not finite stays as it is and is not averaged."""
    total = weight = 0.0
    new, found = min(1.0, SMOOTH / max(len(points), 1)), []
    for step, x in points:
        if isfinite(x):
            total, weight = (1 - new) * total + new * x, (1 - new) * weight + new
        found.append((step, total / weight if isfinite(x) else x))
    return found


def _waiting(run: Run) -> list[tuple[int, float]]:
    """Share of the time between two measurements, in percent, as far as the mean speed tells that time."""
    found, before = [], 0
    for r in run.rows:
        if "input_wait_seconds" in r and r.get("pictures_per_second"):
            seconds = (r["step"] - before) * run.settings.data.batch / r["pictures_per_second"]
            found.append((r["step"], min(100.0, 100 * r["input_wait_seconds"] / seconds) if seconds else float("nan")))
            before = r["step"]
    return found


def _has(value: Any, part: str | int) -> bool:
    return part in value if isinstance(value, Mapping) else part < len(value)


def _bin(i: int, count: int) -> str:
    return f"{i / count:.1f}–{(i + 1) / count:.1f}"


def _json(path: Path) -> Any:
    """What a file holds; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
