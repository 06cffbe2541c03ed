"""The peak of memory of this process, for tests that bound it."""

import gc
import os
from pathlib import Path

import pytest

needs_peak = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"),
    reason="the peak of memory is read from /proc, which only Linux has",
)


def peak_bytes() -> int:
    """Return the highest number of resident bytes since `reset_peak`."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def reset_peak():
    """Start to measure the peak anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
