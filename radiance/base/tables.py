"""Format rows of text as aligned columns."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """Rows in columns, the first `left` of which are words."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if i < num_text_columns else '>'}{w}}"
            for i, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
