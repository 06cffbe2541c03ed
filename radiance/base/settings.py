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

from radiance.base.errors import ConfigError


def require(condition: bool, message: str):
    if not condition:
        raise ConfigError(message)


class Section:
    """Base of all sections: checks the type of every field, then the section's own `check`."""

    def __post_init__(self):
        hints = _type_hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(
                self,
                f.name,
                _coerce_value(
                    f"{type(self).__name__.lower()}.{f.name}", getattr(self, f.name), hints[f.name]
                ),
            )
        self.check()

    def check(self):
        """Raises ConfigError when the fields contradict each other."""

    @classmethod
    def from_name(cls, name: str) -> Self:
        """The section kept under that name. Raises ConfigError where there is none."""
        section, first = cls.__name__.lower(), dataclasses.fields(cls)[0].name
        raise ConfigError(
            f"{section}={name} does not say which setting: write {section}.KEY=value, such as {section}.{first}=…."
        )


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
        *section_names, field_name = key.split(".")
        node, section = tree, type(config)
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
    """Nested plain dicts and tuples, ready for JSON."""
    return {f.name: _to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _to_plain(value: Any) -> Any:
    if isinstance(value, Section):
        return to_dict(value)
    return tuple(map(_to_plain, value)) if isinstance(value, tuple) else value


def from_dict(section_type: type[S], values: Mapping[str, Any]) -> S:
    """The inverse of `to_dict`. Missing keys take their defaults; unknown ones raise ConfigError."""
    require(
        isinstance(values, Mapping),
        f"{section_type.__name__} must be an object with keys, not {values!r}.",
    )
    fields = {}
    for key, value in values.items():
        field_type = _field_type(section_type, key, key)
        if _is_section(field_type):
            value = from_dict(field_type, value)
        elif (
            get_origin(field_type) is tuple
            and _is_section(item_type := get_args(field_type)[0])
            and isinstance(value, (list, tuple))
        ):
            value = tuple(
                element if isinstance(element, item_type) else from_dict(item_type, element)
                for element in value
            )
        fields[key] = value
    return section_type(**fields)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def to_json(config: Section) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(section_type: type[S], text: str) -> S:
    try:
        return from_dict(section_type, json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"The config is not JSON: {error}.") from None


def differences(a: Section, b: Section, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    changes = {}
    for f in dataclasses.fields(a):
        x, y, key = getattr(a, f.name), getattr(b, f.name), prefix + f.name
        if isinstance(x, Section):
            changes |= differences(x, y, key + ".")
        elif x != y:
            changes[key] = (x, y)
    return changes


def suggest_name(word: str, names: Iterable[str]) -> str:
    """ ": did you mean …?", where there is a name like it."""
    matches = difflib.get_close_matches(word, list(names), n=1)
    return f": did you mean {matches[0]!r}?" if matches else ""


@functools.cache
def _type_hints(section: type) -> dict[str, Any]:
    """Of its fields, by name. They are written as text, and reading that takes longer than all else that is done with a config."""
    return get_type_hints(section)


def _field_type(section: type, name: str, key: str) -> Any:
    hints = _type_hints(section)
    if name not in hints:
        raise ConfigError(
            f"Unknown key {key!r}{suggest_name(name, hints) or '.'} {section.__name__} has {', '.join(hints)}."
        )
    return hints[name]


def _parse_value(key: str, text: str, field_type: Any) -> Any:
    """A command-line word as the plain value that `_coerce` will check."""
    origin = get_origin(field_type)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        return _parse_value(key, text, next(a for a in get_args(field_type) if a is not type(None)))
    if origin is tuple:
        item_type = get_args(field_type)[0]
        if _is_section(item_type) or (
            item_type is str and text.startswith("[")
        ):  # texts may hold commas
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                example = '[{"key": "value"}, …]' if _is_section(item_type) else '["one", "two"]'
                raise ConfigError(
                    f"{key}={text}: this list is not JSON: write {example}."
                ) from None
        elements = [element.strip() for element in text.strip("()[]").split(",") if element.strip()]
        if (
            get_origin(item_type) is Literal
        ):  # names, which Python writes with quotes, and so do our messages: ('black', 'navy')
            elements = [element.strip("'\"") for element in elements]
        return tuple(_parse_value(key, element, item_type) for element in elements)
    if field_type is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if field_type in (int, float):
        try:
            return field_type(text)
        except ValueError:
            raise ConfigError(
                f"{key}={text!r}: {'a whole number' if field_type is int else 'a number'} is expected."
            ) from None
    return text


def _coerce_value(key: str, value: Any, field_type: Any) -> Any:
    """The value as `kind` (lists become tuples, whole numbers floats), or ConfigError."""
    origin, args = get_origin(field_type), get_args(field_type)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{key}={value!r}{suggest_name(str(value), args) or ' is not known;'} the choices are {', '.join(args)}."
            )
        return value
    if origin in (Union, types.UnionType):
        return (
            None
            if value is None
            else _coerce_value(key, value, next(a for a in args if a is not type(None)))
        )
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{key}={value!r}: a list is expected.")
        require(
            args[-1] is Ellipsis or len(value) == len(args),
            f"{key}={value!r}: {len(args)} values are expected.",
        )
        return tuple(_coerce_value(key, v, args[0]) for v in value)
    if field_type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, field_type) or (field_type is int and isinstance(value, bool)):
        raise ConfigError(f"{key}={value!r}: {field_type.__name__} is expected.")
    return value
