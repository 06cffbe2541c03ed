r"""Text files of users and of other programs: prompts, captions, lists, settings.

Text is UTF-8, on every system and whatever its code page is. A byte order mark is removed. Bytes
that are not UTF-8 are refused, because any guess at another encoding would put wrong words into
captions. NUL characters are refused too: they occur in UTF-16, and in files that a power failure
has damaged. Lines end with \n or \r\n. All other characters, such as U+2028, NEL and form feed,
belong to the line that they are in.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from radiance.base.errors import TextError
from radiance.base.files import read_file

MAX_QUOTED_CHARACTERS = 60  # of a text in an error message


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        TextError: It is not text in UTF-8.
        OSError: It cannot be read.
    """
    return decode_text(read_file(path), path)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without their ends.

    Raises:
        TextError: It is not text in UTF-8.
        OSError: It cannot be read.
    """
    return split_lines(read_text(path))


def decode_text(content: bytes, name: str | Path) -> str:
    """Decode the content of a text file.

    Args:
        content: The bytes of the file.
        name: What the message calls the text, such as the path of its file.

    Raises:
        TextError: It is not text in UTF-8.
    """
    try:
        text, position = content.decode("utf-8").removeprefix("\ufeff"), content.find(b"\0")
    except UnicodeDecodeError as error:
        text, position = "", error.start
    if position >= 0:
        raise TextError(f"{name} is not UTF-8 text (byte {position}): save it as UTF-8.")
    return text


def check_text(text: str, name: str):
    """Raise TextError if a text of the command line or of a program is not valid Unicode.

    Python represents bytes of the command line that are not UTF-8 by lone surrogates.

    Args:
        text: The text.
        name: What the message calls it.
    """
    if match := re.search("[\0\ud800-\udfff]", text):
        raise TextError(
            f"{name} {quote_text(text)} is not UTF-8 text (character {match.start()}): correct it."
        )


def replace_invalid(text: str) -> str:
    """Replace what is not valid Unicode by U+FFFD, in names that are shown but not used."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def quote_text(text: str) -> str:
    """Quote a text for an error message, shortened if it is long."""
    is_long = len(text) > MAX_QUOTED_CHARACTERS
    return repr(text[: MAX_QUOTED_CHARACTERS - 3] + "..." if is_long else text)


def split_lines(text: str) -> list[str]:
    r"""Split text at \n and \r\n only; an end after the last line adds no empty line."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def iter_lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Yield the lines of a stream with their ends; None in place of a line over `max_bytes`."""
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(max_bytes)
        yield None
