"""Format rows of text as tables: plain text, GitHub Markdown or HTML."""

from collections.abc import Sequence
from typing import Any, Literal

from tabulate import tabulate


def format_table(
    rows: Sequence[Sequence[Any]],
    num_text_columns: int = 1,
    style: Literal["plain", "github", "html"] = "plain",
) -> str:
    """Format rows as a table with aligned columns.

    Args:
        rows: Cells, which are converted to text. The first row is the header.
        num_text_columns: Number of columns, from the left, that are aligned left; the others are
            aligned right.
        style: "plain" for terminals, "github" for Markdown, or "html", which escapes the cells.

    Returns:
        The table, without a line break at its end.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    alignment = ["left" if i < num_text_columns else "right" for i in range(len(rows[0]))]
    if style == "plain":  # tabulate pads the header of right-aligned columns
        headers, body = (), cells
    else:
        headers, body = cells[0], cells[1:]
    table = tabulate(
        body,
        headers=headers,
        tablefmt=style,
        colalign=alignment if body else None,
        headersalign=alignment,
        disable_numparse=True,
        preserve_whitespace=style == "plain",
    )
    return "\n".join(line.rstrip() for line in table.split("\n"))


def format_number(x: float) -> str:
    """Format a number with four significant digits and a suffix k, M or G: 0.002, 20k, 1.5M."""
    for size, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(x) >= size:
            return f"{x / divisor:.4g}{suffix}"
    return f"{x:.4g}".replace("e-0", "e-")
