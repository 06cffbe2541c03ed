"""Line charts as SVG inside HTML: no script; colors follow the page's light or dark."""

import html
from collections.abc import Sequence
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

COLORS = tuple(f"var(--c{i})" for i in range(8))
CHART_CSS = """
:root{color-scheme:light dark;--c0:#2a6fbb;--c1:#d1592a;--c2:#2f8f5b;--c3:#9457b8;--c4:#b8860b;--c5:#c23b6b;--c6:#3a9aa8;--c7:#7a7a3a;--grid:#8883}
@media screen and (prefers-color-scheme:dark){
:root{--c0:#6aa9ec;--c1:#f08a5d;--c2:#66c592;--c3:#c08fe0;--c4:#e0b040;--c5:#ee7aa3;--c6:#6fcbd8;--c7:#b9b96a}}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(26em,100%),1fr));gap:1em 2em}
.chart{margin:0;break-inside:avoid}.chart svg{width:100%;display:block}.chart text{font-size:11px;fill:currentColor;opacity:.75}
.chart polyline,.chart circle{stroke:var(--c)}.chart polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}.chart circle{fill:var(--c);stroke:none}
.legend span{margin-right:1em;white-space:nowrap;font-size:12px}.legend i{display:inline-block;width:1.2em;border-top:3px solid var(--c);margin-right:.4em;vertical-align:middle}
.faint{opacity:.35}.dashed{stroke-dasharray:5 3}
"""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 520, 240, 52, 22, 34
MAX_POINTS = 2000  # points of a line: beyond, the lowest and the highest of each stretch


class Line(NamedTuple):
    name: str  # "" leaves it out of the legend
    points: Sequence[tuple[float, float]]
    color: str = COLORS[0]  # of CSS
    style: str = ""  # "", faint or dashed


def render_line_chart(
    title: str, unit: str, lines: Sequence[Line], log_scale: bool = False, x_label: str = "step"
) -> str:
    """A figure of values over steps, or over another axis. What is not finite (or, on a logarithmic axis, not positive) leaves a gap. "" where nothing is left."""
    good = [[(x, y) for x, y in line.points if _fits(y, log_scale)] for line in lines]
    if not any(good):
        return ""
    scale = log10 if log_scale else float
    ys = [scale(y) for points in good for _, y in points]
    low, high = (min(ys), max(ys)) if log_scale else (min(0.0, *ys), max(ys))
    pad = 0.04 * (high - low) or 0.1
    low, high = (low - pad if log_scale or low < 0 else low), high + pad
    right = max(1, *(x for points in good for x, _ in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - 14) * x / right, TOP + (HEIGHT - TOP - BOTTOM) * (
            high - scale(y)
        ) / (high - low)

    parts = [
        f'<text x="4" y="12">{html.escape(unit)}</text><text x="{WIDTH - 14}" y="{HEIGHT - 4}" text-anchor="end">{x_label}</text>'
    ]
    for y in log_ticks(10**low, 10**high) if log_scale else linear_ticks(low, high):
        at = place(0, y)[1]
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - 14}" stroke="var(--grid)"/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{format_number(y)}</text>'
        )
    for x in linear_ticks(0, right):
        at = place(x, 10**low if log_scale else low)[0]
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{format_number(x)}</text>'
        )
    for line in lines:
        parts += _drawn(line, log_scale, place)
    named = [
        f'<span style="--c:{line.color}"><i></i>{html.escape(line.name)}</span>'
        for line in lines
        if line.name
    ]
    legend = f'<div class="legend">{" ".join(named)}</div>' if named else ""
    label = html.escape(title)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label} by {x_label}">{"".join(parts)}</svg>'
    return f'<figure class="chart"><figcaption><b>{label}</b></figcaption>{svg}{legend}</figure>'


def _fits(y: float, log: bool) -> bool:
    return isfinite(y) and (y > 0 or not log)


def _drawn(line: Line, log: bool, place) -> list[str]:
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in _thinned(line.points):
        if _fits(y, log):
            stretches[-1].append(place(x, y))
        elif stretches[-1]:
            stretches.append([])
    found = []
    for points in filter(None, stretches):
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        found.append(f'<polyline class="{line.style}" style="--c:{line.color}" points="{text}"/>')
        if len(points) <= 30 and line.style != "faint":
            found += [
                f'<circle style="--c:{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>'
                for x, y in points
            ]
    return found


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    size, found = ceil(2 * len(points) / MAX_POINTS), []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        found += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return found


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers in between, about five."""
    rough = (high - low) / 5
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with what stands between them where they are few."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    for between in ((1,), (1, 2, 5)):
        found = [m * 10.0**p for p in powers for m in between if low <= m * 10.0**p <= high]
        if len(found) >= 3:
            return found[:: ceil(len(found) / 8)]
    return [y for y in linear_ticks(low, high) if y > 0]


def format_number(x: float) -> str:
    """0.002, 20k, 1.5M"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{x:.4g}".replace("e-0", "e-")
