"""Read JSON files that may be damaged."""

import json
from pathlib import Path
from typing import Any

from radiance.base.errors import OutputError

MAX_INTEGER = 2**63


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON, not UTF-8, or nested too deeply. The message is short.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, line {error.lineno} column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, expected_type: type, remedy: str) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        expected_type: dict, list, float or str: type of the outermost value.
        remedy: What the user can do if the file is damaged.

    Raises:
        OutputError: The file cannot be read, or is not JSON of that type.
    """
    try:
        value = parse_json(path.read_bytes())
        if not isinstance(value, expected_type) or isinstance(value, bool):
            raise ValueError(f"it holds no {expected_type.__name__}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{path} is damaged ({reason}): {remedy}.") from None
    return value


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < MAX_INTEGER)


def are_numbers(values: Any) -> bool:
    """Return whether a JSON value is a list of numbers, or an object whose values are numbers."""
    if isinstance(values, dict):
        values = list(values.values())
    return isinstance(values, list) and all(map(is_number, values))
