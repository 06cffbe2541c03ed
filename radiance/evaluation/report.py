"""`report.html` of a run: what it was, how its losses fell, and what it painted; one file, no script, no network."""

import base64
import html
from collections.abc import Sequence
from math import isfinite, log10
from pathlib import Path

from radiance import config
from radiance.training.directory import RunDirectory

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.1em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:12px}img{image-rendering:pixelated;max-width:100%;min-width:50%}"
)
WIDTH, HEIGHT, MARGIN = 720, 240, 48


def write_report(directory: Path) -> Path:
    """Writes report.html into a run directory from what lies there. Raises ConfigError when it is none."""
    run = RunDirectory(directory)
    settings = run.read_config()
    rows = run.read_metrics()
    training = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    validation = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    bins = [r for r in rows if "validation_bins" in r]

    parts = [f"<h1>{html.escape(settings.name)}</h1>", f"<p>{len(training)} measurements up to step {rows[-1]['step'] if rows else 0}.</p>"]
    if training:
        parts += ["<h2>Loss</h2>", curves({"training": training, "validation": validation})]
    if bins:
        last = bins[-1]["validation_bins"]
        head = "".join(f"<th>{i / len(last):.1f}–{(i + 1) / len(last):.1f}</th>" for i in range(len(last)))
        table = "".join(f"<tr><td>{r['step']}</td>{''.join(f'<td>{x:.4f}</td>' for x in r['validation_bins'])}</tr>" for r in bins)
        parts += ["<h2>Validation loss by time</h2>", f"<table><tr><th>step</th>{head}</tr>{table}</table>"]
    samples = sorted(run.samples.glob("*.png"))
    for path in [samples[0], samples[-1]] if len(samples) > 1 else samples:
        data = base64.b64encode(path.read_bytes()).decode()
        parts += [f"<h2>Painted at step {int(path.stem)}</h2>", f'<img alt="samples" src="data:image/png;base64,{data}">']
    for name in ("command.txt", "data.json", "environment.json"):
        if (run.path / name).is_file():
            parts += [f"<h2>{name}</h2>", f"<pre>{html.escape((run.path / name).read_text())}</pre>"]
    parts += ["<h2>config.json</h2>", f"<pre>{html.escape(config.to_json(settings))}</pre>"]

    title = html.escape(settings.name)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><body>{"".join(parts)}</body></html>\n'
    path = run.path / "report.html"
    path.write_text(page)
    return path


def curves(series: dict[str, Sequence[tuple[int, float]]]) -> str:
    """An SVG of values over steps; the values on a logarithmic axis."""
    points = {name: [(x, log10(y)) for x, y in values if isfinite(y) and y > 0] for name, values in series.items()}
    xs = [x for values in points.values() for x, _ in values] or [0]
    ys = [y for values in points.values() for _, y in values] or [0.0]
    low, high = min(ys), max(max(ys), min(ys) + 1e-6)

    def place(x: float, y: float) -> str:
        return f"{MARGIN + (WIDTH - 2 * MARGIN) * x / max(max(xs), 1):.1f},{HEIGHT - MARGIN / 2 - (HEIGHT - MARGIN) * (y - low) / (high - low):.1f}"

    lines = []
    for i, (name, values) in enumerate(points.items()):
        colour = ("#8ab", "#c40")[i % 2]
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{" ".join(place(x, y) for x, y in values)}"/>')
        lines.append(f'<text x="{MARGIN + 90 * i}" y="14" fill="{colour}">{name}</text>')
    ticks = "".join(f'<text x="0" y="{place(0, y).split(",")[1]}" font-size="11">{10**y:.3g}</text>' for y in (low, (low + high) / 2, high))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="loss over steps">{ticks}{"".join(lines)}</svg>'
