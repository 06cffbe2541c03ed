"""Lines while a program is compiled."""

import threading

import pytest

from radiance.base import compilation


def test_a_long_compilation_is_reported(monkeypatch):
    monkeypatch.setattr(compilation, "FIRST_REPORT", 0.0)
    monkeypatch.setattr(compilation, "REPORT_INTERVAL", 0.01)
    lines, has_two_lines = [], threading.Event()
    num_threads = threading.active_count()

    def report(line):
        lines.append(line)
        if len(lines) == 2:
            has_two_lines.set()

    with compilation.report_compilation("the step", "cached afterwards", report):
        assert has_two_lines.wait(60)
    assert threading.active_count() == num_threads  # nothing is reported after the block
    assert lines[:2] == ["compiling the step (cached afterwards) …", "compiling the step: 0 s …"]


def test_a_short_compilation_is_not_reported(capsys):
    with pytest.raises(ZeroDivisionError), compilation.report_compilation("the step"):
        raise ZeroDivisionError
    assert not capsys.readouterr().err
