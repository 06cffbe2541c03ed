"""Errors of Orbax in one sentence, and none of the lines that it prints besides."""

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from radiance.base.errors import CheckpointError, RadianceError
from radiance.base.files import is_disk_full

MAX_REASON_LENGTH = 160  # characters
# Errors of the machine, not of the files: the same read may succeed later.
MACHINE_ERRNOS = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
)
MACHINE_STATUSES = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are damaged or incomplete."""


class ErrorTranslator:
    """Translates an exception of Orbax into a CheckpointError of one sentence.

    Args:
        subject: What is written or read, such as "The checkpoint of step 3".
        directory: Folder of the checkpoints.
        verb: written or read.
    """

    def __init__(self, subject: str, directory: Path, verb: str = "written"):
        self.message, self.verb = f"{subject} in {directory} could not be {verb}", verb

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if not isinstance(error, Exception) or isinstance(error, RadianceError):
            return
        reason = _summarize(error)
        if self.verb == "written" and is_disk_full(error):
            reason = f"its disk is full: make room there and run the same command again ({reason})"
        if self.verb == "read" and _is_damage(error):
            raise DamagedCheckpointError(f"{self.message}: {reason}") from error
        raise CheckpointError(f"{self.message}: {reason}") from error


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _summarize(error: BaseException) -> str:
    """Return the item that failed and the first cause, without the details of TensorStore."""
    first_cause = [*_iterate_causes(error)][-1]
    lines = str(first_cause).strip().splitlines()
    reason = lines[0].partition(" [tensorstore_spec")[0] if lines else type(first_cause).__name__
    if len(reason) > MAX_REASON_LENGTH:
        reason = reason[:MAX_REASON_LENGTH] + "…"
    item = re.search(r"Failed to load checkpointable: (\w+)", str(error))
    return f"its {item[1]} are damaged or incomplete ({reason})" if item else reason


def _is_damage(error: BaseException) -> bool:
    """Return whether the files are at fault, and not memory, permissions or the network."""
    for cause in _iterate_causes(error):
        text = str(cause)
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) in MACHINE_ERRNOS:
            return False
        if any(os.strerror(code) in text for code in MACHINE_ERRNOS):
            return False
        if any(status in text for status in MACHINE_STATUSES):
            return False
    return True


def _silence_orbax():
    """Suppress the lines that Orbax prints for every save, and thousands of them for a failure."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    # After an error, reads in progress fail where nobody waits for them, are collected before they
    # end, or end in an event loop that is closed already.
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    warnings.filterwarnings("ignore", r"coroutine '[\w.]+' was never awaited", RuntimeWarning)
    report_unraisable = sys.unraisablehook

    def report_others(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        is_read = code is not None and "orbax" in code.co_filename
        if not is_read and str(unraisable.exc_value) != "Event loop is closed":
            report_unraisable(unraisable)

    sys.unraisablehook = report_others


_silence_orbax()
