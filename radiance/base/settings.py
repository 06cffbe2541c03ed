"""Sections of settings: frozen dataclasses with checks, `key=value` changes and JSON.

A section checks its fields when it is built. The settings themselves are in `radiance.config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from radiance.base.errors import ConfigError
from radiance.base.json_files import parse_json

# Sizes of the numbers of settings: of normal numbers in float32, and of seeds.
MIN_FLOAT, MAX_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127
MAX_INTEGER = 2**32
MAX_SHOWN_LENGTH = 200  # characters of a wrong value in a message

S = TypeVar("S", bound="Section")


def require(condition: bool, message: str):
    """Raise ConfigError with `message` unless `condition` is true."""
    if not condition:
        raise ConfigError(message)


def resumable(
    default: Any = dataclasses.MISSING, *, factory: Callable[[], Any] | None = None
) -> Any:
    """Return a dataclass field whose value may change when a run resumes.

    A run directory refuses to resume when any other setting differs. On a field that holds a
    section, it applies to all fields of that section.

    Args:
        default: The default value of the field.
        factory: A function that returns the default value, in place of `default`.
    """
    metadata = {"resumable": True}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base class of all sections. It checks the type of every field, then calls `check`."""

    def __post_init__(self):
        for name, field_type in _type_hints(type(self)).items():
            key = f"{type(self).__name__.lower()}.{name}"
            object.__setattr__(self, name, _coerce_value(key, getattr(self, name), field_type))
        self.check()

    def check(self):
        """Raise ConfigError if the fields contradict each other."""

    @classmethod
    def from_name(cls: type[S], name: str) -> S:
        """Return the predefined section of that name.

        Raises:
            ConfigError: When there is none. This base class has none.
        """
        section, first = cls.__name__.lower(), next(iter(_type_hints(cls)))
        raise ConfigError(
            f"{section}={name} does not say which setting: write {section}.KEY=value, "
            f"such as {section}.{first}=…."
        )


def require_at_least(section: Section, minimum: int, *names: str):
    """Raise ConfigError if one of the named fields is less than `minimum`."""
    for name in names:
        value = getattr(section, name)
        key = f"{type(section).__name__.lower()}.{name}"
        require(value >= minimum, f"{key}={value} must be at least {minimum}.")


def require_fraction(section: Section, *names: str):
    """Raise ConfigError if one of the named fields is not in [0, 1]."""
    for name in names:
        value = getattr(section, name)
        key = f"{type(section).__name__.lower()}.{name}"
        require(0 <= value <= 1, f"{key}={value} must be between 0 and 1.")


# --- changes and conversion ---------------------------------------------------------------------


def override(config: S, changes: Iterable[str]) -> S:
    """Return `config` with changes applied in order.

    All changes are applied before the result is checked, so that changes that belong together
    (such as of hidden size and number of heads) can be given in any order.

    Args:
        config: Any section.
        changes: Texts of the form "section.key=value", where values are parsed as the type of the
            field, or "section=NAME", which inserts a predefined section.

    Raises:
        ConfigError: For an unknown key (the message suggests the nearest one) or a wrong value.
    """
    tree = to_dict(config)
    for change in changes:
        key, separator, text = change.partition("=")
        require(bool(separator), f"{change!r} is not of the form key=value.")
        *section_names, field_name = key.split(".")
        node: dict[str, Any] = tree
        section: type = type(config)
        for name in section_names:
            section = _field_type(section, name, key)
            require(_is_section(section), f"{key!r}: {name!r} is a value, not a section.")
            node = node[name]
        field_type = _field_type(section, field_name, key)
        if _is_section(field_type):
            node[field_name] = to_dict(field_type.from_name(text))
        else:
            node[field_name] = _parse_value(key, text, field_type)
    return from_dict(type(config), tree)


def to_dict(config: Section) -> dict[str, Any]:
    """Return a section as nested dictionaries and tuples, ready for JSON."""
    return {name: _to_plain(getattr(config, name)) for name in _type_hints(type(config))}


def _to_plain(value: Any) -> Any:
    """Convert the sections in a value to dictionaries."""
    if isinstance(value, Section):
        return to_dict(value)
    return tuple(map(_to_plain, value)) if isinstance(value, tuple) else value


def from_dict(section_type: type[S], values: Any) -> S:
    """Return a section from nested dictionaries: the inverse of `to_dict`.

    Missing keys take their defaults.

    Raises:
        ConfigError: For unknown keys and wrong values.
    """
    require(
        isinstance(values, Mapping),
        f"{section_type.__name__} must be an object with keys, not {_abbreviate(values)}.",
    )
    fields = {}
    for key, value in values.items():
        fields[key] = _build_sections(_field_type(section_type, key, key), value)
    return section_type(**fields)


def _build_sections(field_type: Any, value: Any) -> Any:
    """Convert dictionaries to the sections that a field holds."""
    if _is_section(field_type):
        return from_dict(field_type, value)
    if get_origin(field_type) is tuple and isinstance(value, (list, tuple)):
        item_type = get_args(field_type)[0]
        if _is_section(item_type):
            return tuple(
                item if isinstance(item, item_type) else from_dict(item_type, item)
                for item in value
            )
    return value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def to_json(config: Section) -> str:
    """Return a section as indented JSON."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(section_type: type[S], text: str) -> S:
    """Return a section from JSON. Raise ConfigError for unknown keys and wrong values."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"The config is not JSON: {error}.") from None
    return from_dict(section_type, values)


def differences(a: Section, b: Section, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, with both values.

    Args:
        a: A section.
        b: A section of the same type.
        prefix: Text before every key, such as "model.".
    """
    changes = {}
    for name in _type_hints(type(a)):
        x, y, key = getattr(a, name), getattr(b, name), prefix + name
        if isinstance(x, Section):
            changes |= differences(x, y, key + ".")
        elif x != y:
            changes[key] = (x, y)
    return changes


def resumable_settings(section_type: type[Section]) -> frozenset[str]:
    """Return the dotted keys of all settings that may change when a run resumes."""
    return frozenset(_list_resumable(section_type, "", False))


def _list_resumable(section_type: type, prefix: str, is_inherited: bool) -> list[str]:
    keys, hints = [], _type_hints(section_type)
    for f in dataclasses.fields(section_type):
        is_resumable = is_inherited or f.metadata.get("resumable", False)
        if _is_section(hints[f.name]):
            keys += _list_resumable(hints[f.name], f"{prefix}{f.name}.", is_resumable)
        elif is_resumable:
            keys.append(prefix + f.name)
    return keys


# --- names and types ----------------------------------------------------------------------------


def suggest_name(word: str, names: Iterable[str]) -> str:
    """Return ": did you mean 'NAME'?" with the most similar name, or "" if none is similar."""
    matches = difflib.get_close_matches(word, list(names), n=1)
    return f": did you mean {matches[0]!r}?" if matches else ""


@functools.cache
def _type_hints(section: type) -> dict[str, Any]:
    """Return the types of all fields by name, in order.

    They are stored as text, and evaluating it takes longer than all other work on a config.
    """
    return get_type_hints(section)


def _field_type(section: type, name: str, key: str) -> Any:
    hints = _type_hints(section)
    if name not in hints:
        raise ConfigError(
            f"Unknown key {key!r}{suggest_name(name, hints) or '.'} "
            f"{section.__name__} has {', '.join(hints)}."
        )
    return hints[name]


def _is_optional(field_type: Any) -> bool:
    return get_origin(field_type) in (Union, types.UnionType)


def _strip_optional(field_type: Any) -> Any:
    return next(a for a in get_args(field_type) if a is not type(None))


# --- values -------------------------------------------------------------------------------------


def _parse_value(key: str, text: str, field_type: Any) -> Any:
    """Parse a word of the command line as a plain value, which `_coerce_value` checks later."""
    if _is_optional(field_type):
        if text.lower() in ("none", "null"):
            return None
        return _parse_value(key, text, _strip_optional(field_type))
    if get_origin(field_type) is tuple:
        return _parse_list(key, text, get_args(field_type)[0])
    if field_type is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if field_type in (int, float):
        try:
            return field_type(text)
        except ValueError:
            expected = "a whole number" if field_type is int else "a number"
            raise ConfigError(f"{key}={text!r}: {expected} is expected.") from None
    return text


def _parse_list(key: str, text: str, item_type: Any) -> Any:
    is_section = _is_section(item_type)
    if is_section or (item_type is str and text.startswith("[")):  # texts may contain commas
        try:
            return parse_json(text)
        except ValueError:
            example = '[{"key": "value"}, …]' if is_section else '["one", "two"]'
            raise ConfigError(f"{key}={text}: this list is not JSON: write {example}.") from None
    items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
    if get_origin(item_type) is Literal:
        # Python and our messages write names with quotes: ('black', 'navy').
        items = [item.strip("'\"") for item in items]
    return tuple(_parse_value(key, item, item_type) for item in items)


def _coerce_value(key: str, value: Any, field_type: Any) -> Any:
    """Return the value as the field's type, or raise ConfigError.

    Lists become tuples and whole numbers become floats.
    """
    origin, args = get_origin(field_type), get_args(field_type)
    if origin is Literal:
        if value not in args:
            problem = suggest_name(str(value), args) or " is not known;"
            raise ConfigError(
                f"{key}={_abbreviate(value)}{problem} the choices are {', '.join(args)}."
            )
        return value
    if _is_optional(field_type):
        return None if value is None else _coerce_value(key, value, _strip_optional(field_type))
    if origin is tuple:
        require(
            isinstance(value, (list, tuple)), f"{key}={_abbreviate(value)}: a list is expected."
        )
        require(
            args[-1] is Ellipsis or len(value) == len(args),
            f"{key}={_abbreviate(value)}: {len(args)} values are expected.",
        )
        return tuple(_coerce_value(key, v, args[0]) for v in value)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not (is_integer and field_type in (int, float)) and (
        not isinstance(value, field_type) or (field_type is int and isinstance(value, bool))
    ):
        raise ConfigError(f"{key}={_abbreviate(value)}: {field_type.__name__} is expected.")
    if field_type in (int, float):
        _check_number(key, value)
        return field_type(value)
    require(
        not isinstance(value, str) or "\0" not in value,
        f"{key}={_abbreviate(value)} contains a NUL character: remove it.",
    )
    return value


def _check_number(key: str, value: int | float):
    """Raise ConfigError for numbers that the computation cannot hold, and for NaN."""
    if isinstance(value, int):
        require(
            abs(value) < MAX_INTEGER,
            f"{key}={_abbreviate(value)} must be less than 2**32 in size.",
        )
        return
    require(
        value == 0 or MIN_FLOAT <= abs(value) <= MAX_FLOAT,
        f"{key}={value} must be a finite number: 0, or from {MIN_FLOAT:.1e} to {MAX_FLOAT:.1e} in "
        "size, as float32 holds them.",
    )


def _abbreviate(value: Any) -> str:
    """Return a value as text for a message; a large one is cut."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of an integer of thousands of digits, or a deep list
        return "…"
    return text if len(text) <= MAX_SHOWN_LENGTH else f"{text[:MAX_SHOWN_LENGTH]}…"
