"""Names and locks of temporary files, by which files of killed processes are recognized.

A process keeps its temporary files and folders locked by the operating system (flock), which ends
with the process however it ends. Not all network disks lock across hosts. So the name contains the
host too, and files of other hosts count as abandoned only when they are old.
"""

import errno
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from radiance.base.file_locks import try_lock

HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32]
# .NAME.PID@HOST.part; versions before 0.2 had no host and no lock.
NAME_PATTERN = re.compile(
    r"\..+\.(?P<pid>\d{1,10})(-\d+)?(@(?P<host>[A-Za-z0-9-]*))?\.part", re.DOTALL
)
MAX_NAME_BYTES = 150  # of the final name in that of a temporary file
ABANDONED_SECONDS = 86_400.0  # since the last change of a file whose process cannot be found out


@contextmanager
def hold_temp_path(path: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a new temporary path beside `path` that is locked during the block.

    Args:
        path: The final path, whose folder exists.
        create: Creates an empty file or folder at a path, or raises FileExistsError.

    Yields:
        The temporary path.
    """
    temp_path, descriptor = _create_temp_path(path, create)
    try:
        yield temp_path
    finally:
        _close(descriptor)


def _create_temp_path(path: Path, create: Callable[[Path], object]) -> tuple[Path, int | None]:
    """Create a temporary file or folder, and return its path with a locked descriptor."""
    name = path.name if len(os.fsencode(path.name)) <= MAX_NAME_BYTES else path.name[:32]
    count = 0
    while True:
        suffix = f"-{count}" if count else ""
        temp_path = path.with_name(f".{name}.{os.getpid()}{suffix}@{HOST}.part")
        count += 1
        try:
            create(temp_path)
        except FileExistsError:  # another thread is writing the same file
            continue
        # A process that removes abandoned files may be faster than the lock.
        with suppress(BlockingIOError, FileNotFoundError):
            descriptor = _lock(temp_path)
            if temp_path.exists():
                return temp_path, descriptor
            _close(descriptor)


def remove_abandoned(folder: Path):
    """Remove temporary files and folders that killed processes left in a folder."""
    try:
        paths = list(folder.iterdir())
    except OSError:  # files can be written to some folders that cannot be listed
        return
    for path in paths:
        match = NAME_PATTERN.fullmatch(path.name)
        if match and _is_abandoned(path, int(match["pid"]), match["host"]):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _is_abandoned(path: Path, pid: int, host: str | None) -> bool:
    """Return whether no process writes a temporary file any longer."""
    try:
        descriptor = _lock(path)
    except OSError:  # locked by its process, removed meanwhile, or not ours
        return False
    _close(descriptor)
    if host == HOST and descriptor is not None:
        return True
    is_old = time.time() - _find_last_change(path) > ABANDONED_SECONDS
    # A process may have the number of an earlier one, so even a running one keeps no file for ever.
    return is_old or (host is None and descriptor is not None and not _is_running(pid))


def _lock(path: Path) -> int | None:
    """Return a locked descriptor of a file or folder; None if the system or the disk has no locks.

    Raises:
        OSError: If another process has locked it, or it cannot be opened.
    """
    if sys.platform == "win32":  # which cannot open folders, and has no such locks
        return None
    # Network disks lock only files that are open for writing.
    access = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    is_locked = try_lock(descriptor)
    if is_locked:
        return descriptor
    os.close(descriptor)
    if is_locked is False:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has locked it", str(path))
    return None


def _close(descriptor: int | None):
    if descriptor is not None:
        os.close(descriptor)


def _find_last_change(path: Path) -> float:
    """Return the time of the last change of a file, or of any file in a folder."""
    times = [0.0]
    with suppress(OSError):
        times += [
            file.stat().st_mtime for file in (path, *(path.iterdir() if path.is_dir() else ()))
        ]
    return max(times) if len(times) > 1 else time.time()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True
