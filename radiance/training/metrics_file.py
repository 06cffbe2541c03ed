"""Read metrics.jsonl, an object a line, of which lines may be damaged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from radiance.base.json_files import MAX_INTEGER, are_numbers, is_number, parse_json

MAX_NAMED_LINES = 5


class MetricsFile(NamedTuple):
    """The content of metrics.jsonl.

    Attributes:
        rows: Rows that can be read. All values are numbers, but for `validation_bins` (a list of
            numbers) and `gradient_norms` (numbers by name).
        damaged_lines: Numbers of the lines that cannot be read, from 1. A last line that a kill has
            cut does not count.
    """

    rows: list[dict[str, Any]]
    damaged_lines: list[int]


def read_metrics_file(path: Path) -> MetricsFile:
    """Read metrics.jsonl; a file that does not exist has no rows."""
    if not path.exists():
        return MetricsFile([], [])
    *lines, last_line = path.read_bytes().split(b"\n")
    rows, damaged_lines = [], []
    for number, line in enumerate(lines, 1):
        row = _parse_row(line)
        if row is not None:
            rows.append(row)
        elif line:
            damaged_lines.append(number)
    last_row = _parse_row(last_line)
    return MetricsFile(rows if last_row is None else [*rows, last_row], damaged_lines)


def describe_damage(damaged_lines: Sequence[int]) -> str:
    """Return a phrase that names the lines that cannot be read."""
    numbers = ", ".join(map(str, damaged_lines[:MAX_NAMED_LINES]))
    num_others = len(damaged_lines) - MAX_NAMED_LINES
    more = f" and {num_others} more" if num_others > 0 else ""
    return f"metrics.jsonl is damaged in line {numbers}{more}: all other lines are kept"


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Return a row; None if the line is damaged.

    After a power failure, NUL bytes may stand before a row.
    """
    try:
        row = parse_json(line.strip(b"\0 \r"))
    except ValueError:
        return None
    if not isinstance(row, dict) or not _is_step(row.get("step")):
        return None
    return row if all(_is_metric(name, value) for name, value in row.items()) else None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_INTEGER


def _is_metric(name: str, value: Any) -> bool:
    kinds = {"validation_bins": list, "gradient_norms": dict}
    if name in kinds:
        return isinstance(value, kinds[name]) and are_numbers(value)
    return is_number(value)
