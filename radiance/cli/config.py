"""`radiance config`: print the settings."""

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from radiance.cli.arguments import add_verb
from radiance.config.reference import SectionReference, find_sections

MIN_TEXT_WIDTH = 20  # characters of the last column
# Largest parts of the terminal that the other columns take.
MAX_WIDTH_FRACTIONS = (0.4, 0.2, 0.15)


def add_parser(subparsers):
    """Add the arguments of `radiance config`."""
    parser = add_verb(
        subparsers,
        "config",
        "print the settings with their values, defaults and meanings",
        main.__doc__,
        "radiance config optimizer",
        "radiance config data.resolution",
    )
    parser.add_argument(
        "section",
        metavar="SECTION",
        nargs="?",
        default="",
        help="a section, such as model, or one setting, such as train.steps; by default all",
    )
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> int:
    """Print one table of settings for each section; * marks those that a resumed run may change."""
    width = shutil.get_terminal_size((120, 24)).columns
    sections = find_sections(options.section)
    print("\n\n".join(format_section(section, width) for section in sections))
    return 0


def format_section(section: SectionReference, width: int) -> str:
    """Return a section as text: its name and meaning, and one row for each setting.

    Args:
        section: The section.
        width: Columns of the terminal.
    """
    lines = textwrap.wrap(f"{section.name}: {section.meaning}", width)
    if section.predefined_names:
        names = ", ".join(section.predefined_names)
        lines += textwrap.wrap(f"{section.name}=NAME sets all at once: {names}.", width)
    rows = [
        (f"{x.key}{'*' if x.is_resumable else ''}", x.values, x.default or "(empty)", x.meaning)
        for x in section.settings
    ]
    table = [("setting", "values", "default", "meaning"), *rows]
    widths = [
        min(max(len(row[column]) for row in table), int(fraction * width))
        for column, fraction in enumerate(MAX_WIDTH_FRACTIONS)
    ]
    widths.append(max(width - sum(widths) - 2 * len(widths), MIN_TEXT_WIDTH))
    return "\n".join([*lines, "", *(_format_row(row, widths) for row in table)])


def _format_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a row, whose cells are wrapped to the widths of their columns."""
    columns = [
        textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(cells, widths)
    ]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip()
        for line in zip_longest(*columns, fillvalue="")
    )
