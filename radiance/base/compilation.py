"""Report that a program is being compiled."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_REPORT = 3.0  # seconds; programs from the cache are ready before
REPORT_INTERVAL = 30.0  # seconds between two lines


def print_to_stderr(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def report_compilation(
    program: str, note: str = "cached afterwards", report: Callable[[str], object] = print_to_stderr
) -> Iterator[None]:
    """Report, while the block runs, that a program is compiled, and the time that it has taken.

    Nothing is reported of a block that takes less than FIRST_REPORT.

    Args:
        program: Name of the program, such as "the training step".
        note: What else to report when it begins.
        report: Called with each line, from another thread.
    """
    start_time, is_done = time.monotonic(), threading.Event()

    def report_until_done():
        if is_done.wait(FIRST_REPORT):
            return
        report(f"compiling {program} ({note}) …")
        while not is_done.wait(REPORT_INTERVAL):
            report(f"compiling {program}: {time.monotonic() - start_time:.0f} s …")

    thread = threading.Thread(target=report_until_done, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
