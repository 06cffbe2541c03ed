"""How a command fails: one line for errors of its input, and a report for faults of this package.

Messages are one line of printable characters, because names in them come from untrusted files.
"""

import argparse
import io
import os
import platform
import select
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from radiance import __version__
from radiance.base.errors import RadianceError, escape_unprintable

EXIT_INPUT = 2  # an error that the user can correct; argparse ends with it too
EXIT_FAULT = 70  # a fault of this package (EX_SOFTWARE of sysexits.h)
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_BROKEN_PIPE = 141  # the reader of our output has ended, as in `radiance inspect … | head -1`

REPORTED_PACKAGES = ("jax", "jaxlib", "numpy")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and the command that prints the usage, and exit."""
        self.exit(EXIT_INPUT, f"{self.prog}: {_join_lines(message)} (see `{self.prog} --help`).\n")


def escape_unencodable_output():
    """Escape printed characters that the encoding of the terminal lacks.

    Examples are → in code page 1252, and bytes of file names that are not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output():
    """Write what has been printed, so that an error comes now and not when the process ends."""
    if sys.stdout is not None:  # it is None in a process without standard output
        sys.stdout.flush()


def report_error(error: Exception, command: Sequence[str]) -> int:
    """Print one line for an error of the input, or a report for a fault of this package.

    Nothing is printed when the reader of the output has ended.

    Args:
        error: The error that ended a command.
        command: Words of the command line, for the report.

    Returns:
        The exit code.
    """
    is_pipe_broken = isinstance(error, BrokenPipeError) and not _has_reader()
    if not _can_print():
        _discard_output()
    if is_pipe_broken:
        return EXIT_BROKEN_PIPE
    message = describe_input_error(error)
    if message is not None:
        print(f"radiance: {_join_lines(message)}", file=sys.stderr)
        return EXIT_INPUT
    print(_write_fault_report(error, command), file=sys.stderr)
    return EXIT_FAULT


def _has_reader() -> bool:
    """Return whether standard output has a reader; if so, another pipe caused the error."""
    try:
        poll = select.poll()  # Windows has none
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return True
    return not poll.poll(0)


def _can_print() -> bool:
    try:
        flush_output()
    except OSError:
        return False
    return True


def _discard_output():
    """Discard what is left of standard output, so that Python's last flush succeeds."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def describe_input_error(error: Exception) -> str | None:
    """Return the message for an error that input or the machine can cause, or None for others."""
    if isinstance(error, OSError) and error.strerror:
        name = (
            "A file" if error.filename is None else escape_unprintable(os.fsdecode(error.filename))
        )
        return f"{name} cannot be read or written ({error.strerror})."
    if isinstance(error, RadianceError | ImportError | OSError):
        return str(error)
    if isinstance(error, MemoryError) or _is_device_out_of_memory(error):
        reason = str(error).strip().partition("\n")[0] or "the allocation failed"
        return (
            f"There is not enough memory ({reason}): use fewer or smaller images at a time, or a "
            "smaller model."
        )
    return None


def _is_device_out_of_memory(error: Exception) -> bool:
    """Return whether JAX reports that a device has no more memory."""
    jax = sys.modules.get("jax")  # an error of JAX has imported it
    return (
        jax is not None
        and isinstance(error, jax.errors.JaxRuntimeError)
        and str(error).startswith("RESOURCE_EXHAUSTED")
    )


def _write_fault_report(error: Exception, command: Sequence[str]) -> str:
    """Write the traceback to a file, and return a few lines to copy into a bug report."""
    summary = _join_lines(f"{type(error).__name__}: {error}")[:300]
    report_lines = [
        ", ".join(
            [f"radiance {__version__}", f"Python {platform.python_version()}"]
            + [f"{name} {_package_version(name)}" for name in REPORTED_PACKAGES]
            + [platform.platform()]
        ),
        _join_lines(shlex.join(["radiance", *command])),
    ]
    details = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            errors="backslashreplace",
            prefix="radiance-error-",
            suffix=".txt",
            delete=False,
        ) as file:
            file.write("\n".join([*report_lines, "", details]))
        location = f"the traceback in {file.name}"
    except OSError:  # nothing can be written there
        location = f"this traceback:\n{details.rstrip()}"
    heading = f"radiance: a fault of this program ({summary}); please report these lines:"
    return "\n  ".join([heading, *report_lines]) + f"\n  and {location}"


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _join_lines(text: str) -> str:
    return escape_unprintable(" ".join(line.strip() for line in text.splitlines()))
