"""Locks: one holder at a time, who is named, and who may end in any way."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from radiance.base import file_locks, locks
from radiance.base.errors import OutputError
from radiance.base.locks import hold_lock

HOLD = """
import sys, time
from pathlib import Path
from radiance.base.locks import hold_lock
sys.argv = ["radiance", "train", "quickstart.py"]
with hold_lock(Path({path!r}), "runs/a", "Wait."):
    print("held", flush=True)
    time.sleep(60)
"""
COUNT = """
import time
from pathlib import Path
from radiance.base.errors import OutputError
from radiance.base.locks import hold_lock
counter, done = Path({path!r}).with_name("counter"), 0
while done < 15:
    try:
        with hold_lock(Path({path!r}), "runs/a", "Wait."):
            number = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(number + 1))
            done += 1
    except OutputError:
        time.sleep(0.001)
"""


@contextmanager
def process_of(script: str, path):
    process = subprocess.Popen(
        [sys.executable, "-c", script.format(path=str(path))], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_holder_is_named(tmp_path):
    path = tmp_path / "runs" / "a" / ".lock"
    with process_of(HOLD, path) as process:
        assert process.stdout.readline() == "held\n"
        expected = (
            rf"runs/a is in use by process {process.pid} on {socket.gethostname()}, started "
            r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d: radiance train quickstart.py. Wait."
        )
        with pytest.raises(OutputError, match=expected), hold_lock(path, "runs/a", "Wait."):
            raise AssertionError


def test_a_holder_is_named_that_has_just_locked(tmp_path):
    path = tmp_path / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    assert file_locks.try_lock(descriptor)
    writer = threading.Timer(0.3, locks._write_holder, [descriptor])
    writer.start()
    with pytest.raises(OutputError, match=f"by process {os.getpid()} on "), hold_lock(path, "", ""):
        raise AssertionError
    writer.join()
    os.close(descriptor)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_holder_that_ends_in_any_way_lets_go(tmp_path, signum):
    path = tmp_path / ".lock"
    with process_of(HOLD, path) as process:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signum)
        process.wait()
    start = time.monotonic()
    with hold_lock(path, "runs/a", "Wait."):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert time.monotonic() - start < 5
    assert not path.exists()


def test_a_lock_leaves_no_trace(tmp_path):
    (tmp_path / "runs").mkdir()
    with hold_lock(tmp_path / "runs" / "new" / "folder" / ".lock", "runs/new", "Wait."):
        pass
    assert not list((tmp_path / "runs").iterdir())
    with hold_lock(tmp_path / "runs" / "new" / ".lock", "runs/new", "Wait."):
        (tmp_path / "runs" / "new" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "runs" / "new").iterdir()] == ["config.json"]


def test_processes_that_contend_hold_it_in_turn(tmp_path):
    (tmp_path / "counter").write_text("0")
    script = COUNT.format(path=str(tmp_path / ".lock"))
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(6)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 6
    assert (tmp_path / "counter").read_text() == "90"


# --- other hosts ----------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(locks, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(locks, "OBSERVATION_SECONDS", 0.6)
    monkeypatch.setattr(locks, "SETTLING_SECONDS", 0.3)


def write_lock(path, **changes):
    holder = {"host": "elsewhere", "pid": 7, "start": "2026-11-30 12:00:00", "command": "radiance"}
    path.write_text(json.dumps(holder | changes))


def test_another_host_that_renews_its_lock_holds_it(fast, tmp_path, capsys):
    path, ended = tmp_path / ".lock", threading.Event()
    write_lock(path)
    renewal = threading.Thread(
        target=lambda: [path.touch() for _ in iter(lambda: ended.wait(0.05), True)]
    )
    renewal.start()
    try:
        with (
            pytest.raises(OutputError, match="in use by process 7 on elsewhere, started 2026"),
            hold_lock(path, "runs/a", "Wait."),
        ):
            raise AssertionError
    finally:
        ended.set()
        renewal.join()
    assert "whether it still runs" in capsys.readouterr().err


def test_another_host_that_has_ended_is_noticed(fast, tmp_path, capsys):
    path = tmp_path / ".lock"
    write_lock(path)
    with hold_lock(path, "runs/a", "Wait."):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "whether it still runs" in capsys.readouterr().err
    write_lock(path)
    os.utime(path, (time.time() - 3600,) * 2)  # long ago: nothing to wait for
    with hold_lock(path, "runs/a", "Wait."):
        pass
    assert not capsys.readouterr().err


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_disk_without_locks_relies_on_renewals(fast, tmp_path, monkeypatch, has_flock):
    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_):
            raise OSError(37, "No locks available")

    monkeypatch.setattr(file_locks, "fcntl", NoLocks if has_flock else None)
    path = tmp_path / ".lock"
    with (
        hold_lock(path, "runs/a", "Wait."),
        pytest.raises(OutputError, match=f"in use by process {os.getpid()} on"),
        hold_lock(path, "runs/a", "Wait."),
    ):
        raise AssertionError
    assert not path.exists()


def test_the_last_to_write_wins_on_a_disk_without_locks(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(file_locks, "fcntl", None)
    path = tmp_path / ".lock"
    other = threading.Timer(0.1, write_lock, [path])
    other.start()
    with (
        pytest.raises(OutputError, match="in use by process 7 on elsewhere"),
        hold_lock(path, "runs/a", "Wait."),
    ):
        raise AssertionError
    other.join()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"[" * 10_000, b"[]", b'{"host": 1}', b'"text"', b"\xff", b"{" * 3],
)
def test_a_damaged_lock_is_replaced(tmp_path, content):
    path = tmp_path / ".lock"
    path.write_bytes(content)
    with hold_lock(path, "runs/a", "Wait."):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_cannot_print_control_characters(tmp_path, capfd):
    path = tmp_path / ".lock"
    write_lock(path, command="\x1b[2J")
    with hold_lock(path, "runs/a", "Wait."):
        pass
    assert "\x1b" not in "".join(capfd.readouterr())
