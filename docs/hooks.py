"""Parts of the documentation that are made when MkDocs builds it.

Markers in pages are replaced by tables of the settings and of the command line. Pages outside of
docs/, such as results of experiments, become pages of the site. Links to other files of the
repository become their paths, and a link to a file that does not exist is an error.
"""

import argparse
import os
import posixpath
import re
from pathlib import Path

from radiance.cli import make_parser
from radiance.config.reference import SectionReference, find_sections

ROOT = Path(__file__).parents[1]
# Pages and figures outside docs/ that become part of the site, under the same paths.
OUTER_PATTERNS = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/*.md", "experiments/*.md"),
    *("experiments/*/*.md", "experiments/ablations/results/*/*/table.md"),
    "experiments/ablations/results/*/*/gate/gate.md",
    *("experiments/*.png", "experiments/*.jpg", "experiments/ablations/results/*/*/*.svg"),
)

SETTINGS_MARKER = "<!-- settings -->"
COMMANDS_MARKER = "<!-- command line -->"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


# --- hooks of MkDocs ------------------------------------------------------------------------------


def on_files(files, config):
    """Add the pages and figures outside docs/."""
    from mkdocs.structure.files import File  # the tests of this module do without MkDocs

    for path in list_outer_files():
        uri = path.relative_to(ROOT).as_posix()
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, "llms.txt", content=format_index(config.nav)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in the generated tables, and rewrite links that leave docs/."""
    if SETTINGS_MARKER in markdown:
        markdown = markdown.replace(SETTINGS_MARKER, format_settings())
    if COMMANDS_MARKER in markdown:
        markdown = markdown.replace(COMMANDS_MARKER, format_commands())
    return rewrite_links(markdown, Path(page.file.abs_src_path))


# --- the index for language models ----------------------------------------------------------------


def format_index(menu: list) -> str:
    """Return llms.txt: the title, the address and the first paragraph of every page of the menu.

    Args:
        menu: Entries of the menu, as in mkdocs.yml: pages, or titles with pages.
    """
    lines = ["# radiance", "", "> Pixel-space text-to-image transformers in JAX.", ""]
    for title, pages in _list_menu(menu):
        if isinstance(pages, list):
            lines += ["", f"## {title}", "", *(_describe_page(x) for _, x in _list_menu(pages))]
        else:
            lines.append(_describe_page(pages))
    return "\n".join(lines) + "\n"


def _list_menu(menu: list) -> list[tuple[str, str | list]]:
    """Return the titles and contents of entries; a page without a title has none."""
    pairs = [entry if isinstance(entry, dict) else {"": entry} for entry in menu]
    return [item for pair in pairs for item in pair.items()]


def _describe_page(uri: str) -> str:
    folder = ROOT / "docs" if (ROOT / "docs" / uri).exists() else ROOT
    title, *paragraphs = re.split(r"\n\s*\n", (folder / uri).read_text("utf-8"))
    texts = (" ".join(x.split()) for x in paragraphs if re.match(r"[\w`\[]", x))
    text = LINK.sub(r"\2", next(texts, ""))
    address = f"{re.sub('((^|/)(README|index))?[.]md$', '', uri)}/"
    return f"- [{title.removeprefix('# ')}]({address}): {text}"


# --- links ----------------------------------------------------------------------------------------


def list_outer_files() -> list[Path]:
    """Return the files outside docs/ that become part of the site."""
    return sorted(path for pattern in OUTER_PATTERNS for path in ROOT.glob(pattern))


def rewrite_links(markdown: str, page: Path) -> str:
    """Return a page whose links to files outside the site are their paths.

    Args:
        markdown: The text of the page.
        page: Its file.

    Raises:
        ValueError: A link names a file that does not exist.
    """
    outer_files = set(list_outer_files())
    page_uri = _site_uri(page)

    def rewrite(match: re.Match) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = Path(os.path.normpath(page.parent / target))
        if not path.exists():
            raise ValueError(f"{page.relative_to(ROOT)} links to {target}, which does not exist.")
        if path in outer_files or ROOT / "docs" in path.parents:
            uri = posixpath.relpath(_site_uri(path), posixpath.dirname(page_uri))
            return f"{image}[{text}]({uri}{anchor})"
        label, name = text.strip("`"), path.relative_to(ROOT).as_posix()
        code = f"`{name}`{{ .path }}"  # pages.css lets paths wrap in tables
        return code if name.endswith(label) else f"{text} ({code})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)


def _site_uri(path: Path) -> str:
    """Return the path of a file below docs/, or below the repository for outer files."""
    base = ROOT / "docs" if ROOT / "docs" in path.parents else ROOT
    return path.relative_to(base).as_posix()


# --- generated tables -----------------------------------------------------------------------------


def format_settings() -> str:
    """Return one Markdown table for each section of settings."""
    return "\n\n".join(map(_format_section, find_sections()))


def _format_section(section: SectionReference) -> str:
    lines = [f"## {section.name}", "", section.meaning, ""]
    if section.predefined_names:
        names = ", ".join(f"`{name}`" for name in section.predefined_names)
        lines += [f"`{section.name}=NAME` sets all at once: {names}.", ""]
    lines += ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for x in section.settings:
        mark = "\\*" if x.is_resumable else ""
        default = f"`{x.default}`" if x.default else "(empty)"
        cells = (f"`{x.key}`{mark}", x.values, default, x.meaning)
        lines.append(f"| {' | '.join(map(_escape, cells))} |")
    return "\n".join(lines)


def format_commands() -> str:
    """Return the arguments and examples of all verbs in Markdown."""
    parser = make_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return "\n\n".join(_format_verb(verb) for verb in verbs.choices.values())


def _format_verb(parser: argparse.ArgumentParser) -> str:
    verb = parser.prog.removeprefix("radiance ")
    lines = [f"## {verb}", "", parser.description or "", ""]
    lines += ["| argument | meaning |", "|---|---|"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            lines.append(f"| {_format_argument(action)} | {_escape(action.help or '')} |")
    _, _, examples = (parser.epilog or "").partition("examples:\n")
    lines += ["", "```sh", *(line.strip() for line in examples.splitlines()), "```"]
    return "\n".join(lines)


def _format_argument(action: argparse.Action) -> str:
    value = action.metavar or ("" if action.nargs == 0 else (action.dest.upper()))
    if action.choices:
        value = ",".join(map(str, action.choices))
    repetition = " …" if action.nargs in ("*", "+") else ""
    words = [*action.option_strings, f"{value}{repetition}"]
    return f"`{' '.join(word for word in words if word)}`"  # "|" in code does not end a cell


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
