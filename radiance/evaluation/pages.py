"""Render HTML pages without script or network, for light and dark screens and for print."""

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from radiance.evaluation.figures import render_svg_element

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_CSS = """
:root{color-scheme:light dark;--grid:#8883}
body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:2em auto;padding:0 1.2em;
  color:#222;background:#fff}
h1{margin-bottom:.2em}
h2{margin-top:1.8em;border-bottom:1px solid var(--grid)}
table{border-collapse:collapse;font-size:13px;display:block;overflow:auto}
td,th{padding:.2em .9em .2em 0;border-bottom:1px solid var(--grid);vertical-align:top;
  font-variant-numeric:tabular-nums}
pre{background:#8881;padding:.8em;overflow:auto;font-size:12px;white-space:pre-wrap;
  overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(26em,100%),1fr));gap:1em 2em}
.charts figure{margin:0;break-inside:avoid}
.charts svg{width:100%;height:auto;display:block}
.sheets{display:flex;flex-wrap:wrap;gap:1em}
.sheets figure{margin:0;flex:1 1 18em;max-width:50em;break-inside:avoid}
.sheets img{width:100%;image-rendering:pixelated}
@media screen and (prefers-color-scheme:dark){body{color:#ddd;background:#16181c}}
@media print{body{font-size:11px;margin:0;max-width:none}}
"""


def render_page(title: str, sections: Sequence[str]) -> str:
    """Return a complete HTML page.

    Args:
        title: Plain text.
        sections: HTML of the body.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{PAGE_CSS}</style>"
    )
    body = "".join(sections)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def render_charts(figures: Iterable["Figure | None"]) -> str:
    """Return figures side by side; those that are None are left out."""
    charts = [
        f"<figure>{render_svg_element(figure)}</figure>" for figure in figures if figure is not None
    ]
    return f'<div class="charts">{"".join(charts)}</div>'
