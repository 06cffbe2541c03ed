"""Locks of folders, so that two processes do not write the same files.

A lock is a file that its holder keeps locked by the operating system (flock), which ends with the
process however it ends. Not all network disks lock across hosts. So the file also names its holder,
who renews its time: a lock of another host is held as long as its time changes.

The library `filelock` does not replace this: its locks name no holder, and its leases, which are
renewed as here, are lost when a process is suspended for a while.
"""

import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from radiance.base.errors import OutputError
from radiance.base.file_locks import try_lock
from radiance.base.files import is_disk_full, require_folder, write_error
from radiance.base.json_files import parse_json

LOCK_NAME = ".lock"
HOLDER_TYPES = {"host": str, "pid": int, "start": str, "command": str}
RENEWAL_SECONDS = 10.0
OBSERVATION_SECONDS = 30.0  # of a lock of another host; more than two renewals
NAMING_SECONDS = 2.0  # within which a process that has the lock writes its name, even a slow one
SETTLING_SECONDS = 2.0  # after which processes that start at once have written their names
ABANDONED_SECONDS = 600.0  # since the last renewal; more than clocks of hosts differ


class Holder(NamedTuple):
    """The process that holds a lock."""

    host: str
    pid: int
    start: str  # local time
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.start}: {self.command}"


@contextmanager
def hold_lock(path: Path, subject: str, remedy: str) -> Iterator[None]:
    """Hold a lock during the block.

    Args:
        path: File of the lock. Missing parent folders are created.
        subject: What is locked, for the message, such as "runs/quickstart".
        remedy: What the user can do if another process holds it.

    Raises:
        OutputError: Another process holds the lock, which the message names; or the file cannot be
            written.
    """
    require_folder(path.parent)
    new_folders = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, subject, remedy)
    except OSError as error:
        raise write_error(path, error) from error
    stop_event = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, descriptor, stop_event), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        stop_event.set()
        renewal.join()
        _release(path, descriptor, new_folders)


def _acquire(path: Path, subject: str, remedy: str) -> int:
    """Return the open file of the lock, which now names this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            is_locked = try_lock(descriptor)
            holder = _await_holder(descriptor) if is_locked is False else _read_holder(descriptor)
            if is_locked is False or (holder and _is_alive(path, holder, is_locked)):
                raise OutputError(f"{subject} is in use by {holder or 'another process'}. {remedy}")
            # Between opening and locking, the holder before may have removed the file.
            if _is_same_file(path, descriptor):
                _write_holder(descriptor)
                if is_locked is None:
                    _check_written_last(descriptor, subject, remedy)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _check_written_last(descriptor: int, subject: str, remedy: str):
    """On a disk without locks, let the last of several processes that start at once win."""
    time.sleep(SETTLING_SECONDS)
    holder = _read_holder(descriptor)
    if holder is not None and (holder.host, holder.pid) != (socket.gethostname(), os.getpid()):
        raise OutputError(f"{subject} is in use by {holder}. {remedy}")


def _is_alive(path: Path, holder: Holder, is_locked: bool | None) -> bool:
    """Return whether the process that a lock names may still run.

    On this host the lock of the operating system is reliable; for another one, watch the time.
    """
    if is_locked and holder.host == socket.gethostname():
        return False
    renewal_time = _read_mtime(path)
    if renewal_time is None or time.time() - renewal_time / 1e9 > ABANDONED_SECONDS:
        return False
    print(
        f"radiance: {path} names {holder}; waiting {OBSERVATION_SECONDS:.0f} s to see whether it "
        "still runs.",
        file=sys.stderr,
        flush=True,
    )
    end_time = time.monotonic() + OBSERVATION_SECONDS
    while time.monotonic() < end_time:
        time.sleep(OBSERVATION_SECONDS / 30)
        if _read_mtime(path) not in (None, renewal_time):
            return True
    return False


def _read_mtime(path: Path) -> int | None:
    """Return the time of the last change of a file in ns, or None if there is no file."""
    try:
        with path.open("rb") as file:  # network disks cache the time until then
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _await_holder(descriptor: int) -> Holder | None:
    """Return the holder of a locked file, which writes its name soon after it has the lock."""
    end_time = time.monotonic() + NAMING_SECONDS
    while (holder := _read_holder(descriptor)) is None and time.monotonic() < end_time:
        time.sleep(NAMING_SECONDS / 100)
    return holder


def _read_holder(descriptor: int) -> Holder | None:
    """Return the holder that a lock names; None for a new file or a damaged one."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        fields = parse_json(os.read(descriptor, 4096))
    except ValueError:
        return None
    if not isinstance(fields, dict) or {k: type(x) for k, x in fields.items()} != HOLDER_TYPES:
        return None
    holder = Holder(**fields)
    return holder if str(holder).isprintable() else None


def _write_holder(descriptor: int):
    start = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    command = shlex.join(["radiance", *sys.argv[1:]])[:500]
    holder = Holder(socket.gethostname(), os.getpid(), start, command)
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(holder._asdict()).encode() + b"\n")
        os.fsync(descriptor)
    except OSError as error:
        if not is_disk_full(error):  # a full disk still locks
            raise


def _renew(path: Path, descriptor: int, stop_event: threading.Event):
    """Renew the time of a lock until `stop_event` is set."""
    while not stop_event.wait(RENEWAL_SECONDS):
        with suppress(OSError):  # of a disk that is away for a moment
            if _is_same_file(path, descriptor):
                os.utime(path)


def _release(path: Path, descriptor: int, new_folders: list[Path]):
    """Remove a lock, and the folders that were created for it if they are empty."""
    with suppress(OSError):
        if _is_same_file(path, descriptor):
            path.unlink()
    os.close(descriptor)
    for folder in new_folders:
        with suppress(OSError):
            folder.rmdir()
