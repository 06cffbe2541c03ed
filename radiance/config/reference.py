"""The reference of all settings: their values, defaults and meanings.

Everything comes from the dataclasses: the meaning is the docstring under a field, and the limits
are what the checks of its section accept. `radiance config` prints it, and the documentation shows
it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from radiance.base.errors import ConfigError
from radiance.base.settings import (
    MAX_FLOAT,
    MAX_INTEGER,
    MIN_FLOAT,
    Section,
    resumable_settings,
    suggest_name,
)
from radiance.config.model import MODELS
from radiance.config.run import Config
from radiance.config.sample import PRESETS

RUN_SECTION = "run"  # the name of the settings outside sections
# Sections that can be given as a whole, as in model=nano.
PREDEFINED_NAMES = {"model": tuple(MODELS), "sample": tuple(PRESETS)}
# Neighbors of bounds that checks use. The difference is larger than the rounding of float32.
EPSILON = 1e-6


class Setting(NamedTuple):
    """One setting."""

    key: str  # as on the command line: "optimizer.learning_rate"
    values: str  # type, and the limits that hold for the defaults of other settings
    default: str  # as on the command line; "" is an empty text or list
    meaning: str
    is_resumable: bool  # whether it may change when a run resumes


class SectionReference(NamedTuple):
    """All settings of a section."""

    name: str  # as on the command line: "data.shapes"
    meaning: str
    settings: tuple[Setting, ...]
    predefined_names: tuple[str, ...]


@functools.cache
def describe_sections() -> dict[str, SectionReference]:
    """Return the references of all sections by name, in the order of `Config`."""
    return {section.name: section for section in _describe_tree("", Config())}


def find_sections(name: str = "") -> tuple[SectionReference, ...]:
    """Return the reference of one section or one setting, or of all sections.

    Args:
        name: A section such as "data.shapes", or a setting such as "train.steps"; all when empty.

    Raises:
        ConfigError: When there is no such section or setting; the message suggests the nearest.
    """
    sections = describe_sections()
    if not name:
        return tuple(sections.values())
    if name in sections:
        return (sections[name],)
    for section in sections.values():
        for setting in section.settings:
            if setting.key == name:
                return (section._replace(settings=(setting,)),)
    names = [*sections, *(x.key for section in sections.values() for x in section.settings)]
    raise ConfigError(
        f"There is no section or setting {name!r}{suggest_name(name, names) or '.'} "
        f"The sections are {', '.join(sections)}."
    )


def _describe_tree(name: str, section: Section) -> Iterator[SectionReference]:
    """Yield the reference of a section, then those of the sections within it."""
    meanings = read_field_docstrings(type(section))
    hints = get_type_hints(type(section))
    resumable = resumable_settings(Config)
    settings, inner_sections = [], []
    for field in dataclasses.fields(section):  # pyright: ignore[reportArgumentType]
        key = f"{name}.{field.name}" if name else field.name
        value, field_type = getattr(section, field.name), hints[field.name]
        if isinstance(value, Section):
            inner_sections.append((key, value))
            continue
        item_type = get_args(field_type)[0] if get_origin(field_type) is tuple else None
        if isinstance(item_type, type) and issubclass(item_type, Section):
            inner_sections.append((key, item_type()))
        settings.append(
            Setting(
                key,
                f"{_describe_type(field_type)}{_find_limits(section, field.name, field_type)}",
                format_value(value),
                meanings[field.name],
                key in resumable,
            )
        )
    meaning = " ".join((inspect.getdoc(type(section)) or "").split())
    yield SectionReference(
        name or RUN_SECTION, meaning, tuple(settings), PREDEFINED_NAMES.get(name, ())
    )
    is_item = name == "data.mixture"  # its shapes are described with data.shapes
    for key, inner in [] if is_item else inner_sections:
        yield from _describe_tree(key, inner)


def read_field_docstrings(section_type: type[Section]) -> dict[str, str]:
    """Return the docstring under each field of a section, as one line."""
    (definition,) = ast.parse(inspect.getsource(section_type)).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    for statement, following in zip(definition.body, definition.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            text = ast.literal_eval(following.value)
            meanings[statement.target.id] = " ".join(text.split())
    return meanings


def format_value(value: Any) -> str:
    """Format a value as it is written on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, tuple):
        return ", ".join(map(format_value, value))
    return str(value)


# --- types and limits -----------------------------------------------------------------------------


def _describe_type(field_type: Any) -> str:
    """Describe a type in words: "a or b", "number", "list of texts"."""
    arguments = get_args(field_type)
    if get_origin(field_type) is Literal:
        return ", ".join(map(str, arguments))
    if NoneType in arguments:
        return f"none or {_describe_type(_strip_none(field_type))}"
    if get_origin(field_type) is tuple:
        if get_origin(arguments[0]) is Literal:
            return f"list of {_describe_type(arguments[0])}"
        plural = f"{_describe_type(arguments[0])}s"
        return f"list of {plural}" if arguments[-1] is Ellipsis else f"{len(arguments)} {plural}"
    if isinstance(field_type, type) and issubclass(field_type, Section):
        return "JSON object"
    return {bool: "true, false", int: "whole number", float: "number", str: "text"}[field_type]


def _strip_none(field_type: Any) -> Any:
    return next(kind for kind in get_args(field_type) if kind is not NoneType)


def _find_limits(section: Section, name: str, field_type: Any) -> str:
    """Return the limits of a number, such as " > 0" or " from 1 to 5"; "" if there are none."""
    if NoneType in get_args(field_type):
        field_type = _strip_none(field_type)
    if field_type is int:
        return _find_integer_limits(section, name)
    return _find_float_limits(section, name) if field_type is float else ""


def _find_integer_limits(section: Section, name: str) -> str:
    low = next((x for x in range(-1, 3) if not _get_rejection(section, name, x)), None)
    if low in (None, -1) or not _is_limit(section, name, low - 1):
        return ""
    if not _get_rejection(section, name, MAX_INTEGER - 1):
        return f" ≥ {low}"
    high, rejected = low, MAX_INTEGER - 1
    while rejected - high > 1:
        middle = (high + rejected) // 2
        if _get_rejection(section, name, middle):
            rejected = middle
        else:
            high = middle
    # Where larger powers of two are accepted, another rule rejects the numbers between them.
    is_bound = _is_limit(section, name, high + 1) and all(
        _get_rejection(section, name, 2**n) for n in range(high.bit_length(), 32)
    )
    return f" from {low} to {high}" if is_bound else f" ≥ {low}"


def _find_float_limits(section: Section, name: str) -> str:
    limits = []
    for bound, above in ((0.0, MIN_FLOAT), (1.0, 1 + EPSILON)):
        below = bound - EPSILON if bound else -MIN_FLOAT
        if _is_limit(section, name, below) and not _get_rejection(section, name, bound):
            limits.append(f"≥ {bound:g}")
        elif _is_limit(section, name, bound) and not _get_rejection(section, name, above):
            limits.append(f"> {bound:g}")
    if _get_rejection(section, name, MAX_FLOAT):
        if _is_limit(section, name, 1 + EPSILON) and not _get_rejection(section, name, 1.0):
            limits.append("≤ 1")
        elif _is_limit(section, name, 1.0) and not _get_rejection(section, name, 1 - EPSILON):
            limits.append("< 1")
    if limits == ["≥ 0", "≤ 1"]:
        return " from 0 to 1"
    return f" {' and '.join(limits)}" if limits else ""


def _get_rejection(section: Section, name: str, value: float) -> str | None:
    """Return why the section rejects a value of a setting, or None if it accepts it."""
    try:
        dataclasses.replace(section, **{name: value})  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        return str(error)
    return None


def _is_limit(section: Section, name: str, value: float) -> bool:
    """Return whether a value is rejected by itself, and not together with another setting."""
    rejection = _get_rejection(section, name, value)
    if not rejection:
        return False
    section_name = type(section).__name__.lower()
    named = set(re.findall(r"\b(?:[a-z]+\.)+([a-z]\w*)", rejection)) & set(section.__dict__)
    return named <= {name} and (bool(named) or section_name not in rejection.split("=")[0])
