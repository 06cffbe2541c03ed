"""Lines of progress in a log."""

import sys
import time

import pytest

from radiance.training import progress
from radiance.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose number is the time."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    return now


def test_no_time_left_is_printed_while_the_rate_is_unknown(clock, capsys):
    shown = Progress(0, 9, images_per_step=4)
    shown.reset_rate(1)
    shown.update(1, {"loss": 0.5})
    assert capsys.readouterr().err == "step 1/9  loss 0.5\n"
    clock[0] += 30
    shown.update(3, {"loss": 0.25})
    assert capsys.readouterr().err == "step 3/9  loss 0.25  0 images/s  1.5 min left\n"
    shown.close()
