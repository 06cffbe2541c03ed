"""Sections: frozen dataclasses that check their fields when they are built, read `key=value` changes, and go to JSON and back.

What the settings are stands in `config/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot work; the message says which one and what to do."""


def require(condition: bool, message: str):
    if not condition:
        raise ConfigError(message)


class Section:
    """Base of all sections: checks the type of every field, then the section's own `check`."""

    def __post_init__(self):
        hints = _types(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _coerce(f"{type(self).__name__.lower()}.{f.name}", getattr(self, f.name), hints[f.name]))
        self.check()

    def check(self):
        """Raises ConfigError when the fields contradict each other."""

    @classmethod
    def named(cls, name: str) -> Self:
        """The section kept under that name. Raises ConfigError where there is none."""
        section, first = cls.__name__.lower(), dataclasses.fields(cls)[0].name
        raise ConfigError(f"{section}={name} does not say which setting: write {section}.KEY=value, such as {section}.{first}=….")


S = TypeVar("S", bound=Section)


def override(config: S, changes: Iterable[str]) -> S:
    """`config` with `section.key=value` changes, in order; values are read as the field's type.

    `section=NAME` puts in one that the section keeps under that name. Raises ConfigError for an unknown key (with the nearest one)
    or an unfit value.
    """
    # All changes of a section are made before it is checked, so that two that belong together (hidden and heads) can both be made.
    tree = to_dict(config)
    for change in changes:
        key, separator, text = change.partition("=")
        require(bool(separator), f"{change!r} is not of the form key=value.")
        *parents, last = key.split(".")
        node, section = tree, type(config)
        for part in parents:
            section = _field_type(section, part, key)
            require(_is_section(section), f"{key!r}: {part!r} is a value, not a section.")
            node = node[part]
        kind = _field_type(section, last, key)
        if _is_section(kind):
            node[last] = to_dict(kind.named(text))
        else:
            node[last] = _parse(key, text, kind)
    return from_dict(type(config), tree)


def to_dict(config: Section) -> dict[str, Any]:
    """Nested plain dicts and tuples, ready for JSON."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return to_dict(value)
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def from_dict(kind: type[S], values: Mapping[str, Any]) -> S:
    """The inverse of `to_dict`. Missing keys take their defaults; unknown ones raise ConfigError."""
    require(isinstance(values, Mapping), f"{kind.__name__} must be an object with keys, not {values!r}.")
    made = {}
    for key, value in values.items():
        sub = _field_type(kind, key, key)
        if _is_section(sub):
            value = from_dict(sub, value)
        elif get_origin(sub) is tuple and _is_section(item := get_args(sub)[0]) and isinstance(value, (list, tuple)):
            value = tuple(part if isinstance(part, item) else from_dict(item, part) for part in value)
        made[key] = value
    return kind(**made)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def to_json(config: Section) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(kind: type[S], text: str) -> S:
    try:
        return from_dict(kind, json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"The config is not JSON: {error}.") from None


def differences(a: Section, b: Section, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    found = {}
    for f in dataclasses.fields(a):
        x, y, key = getattr(a, f.name), getattr(b, f.name), prefix + f.name
        if isinstance(x, Section):
            found |= differences(x, y, key + ".")
        elif x != y:
            found[key] = (x, y)
    return found


def meant(word: str, known: Iterable[str]) -> str:
    """ ": did you mean …?", where there is a name like it."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


@functools.cache
def _types(section: type) -> dict[str, Any]:
    """Of its fields, by name. They are written as text, and reading that takes longer than all else that is done with a config."""
    return get_type_hints(section)


def _field_type(section: type, name: str, key: str) -> Any:
    hints = _types(section)
    if name not in hints:
        raise ConfigError(f"Unknown key {key!r}{meant(name, hints) or '.'} {section.__name__} has {', '.join(hints)}.")
    return hints[name]


def _parse(key: str, text: str, kind: Any) -> Any:
    """A command-line word as the plain value that `_coerce` will check."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        return _parse(key, text, next(a for a in get_args(kind) if a is not type(None)))
    if origin is tuple:
        item = get_args(kind)[0]
        if _is_section(item) or (item is str and text.startswith("[")):  # texts may hold commas
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                example = '[{"key": "value"}, …]' if _is_section(item) else '["one", "two"]'
                raise ConfigError(f"{key}={text}: this list is not JSON: write {example}.") from None
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        if get_origin(item) is Literal:  # names, which Python writes with quotes, and so do our messages: ('black', 'navy')
            parts = [part.strip("'\"") for part in parts]
        return tuple(_parse(key, part, item) for part in parts)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ConfigError(f"{key}={text!r}: {'a whole number' if kind is int else 'a number'} is expected.") from None
    return text


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """The value as `kind` (lists become tuples, whole numbers floats), or ConfigError."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}={value!r}{meant(str(value), args) or ' is not known;'} the choices are {', '.join(args)}.")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _coerce(key, value, next(a for a in args if a is not type(None)))
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{key}={value!r}: a list is expected.")
        require(args[-1] is Ellipsis or len(value) == len(args), f"{key}={value!r}: {len(args)} values are expected.")
        return tuple(_coerce(key, v, args[0]) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key}={value!r}: {kind.__name__} is expected.")
    return value
