"""Atomic writing of files and folders, and checks of paths and disk space before any work."""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from radiance.base.errors import OutputError
from radiance.base.temp_files import hold_temp_path, remove_abandoned

MAX_FILE_BYTES = 1 << 30  # of a file that is read at once

_temp_paths: set[Path] = set()  # files and folders that `replace_atomically` is writing
_cleaned_folders: set[Path] = set()


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block succeeds.

    If the block raises an error, the temporary file is removed and `path` is unchanged. A file that
    a killed process left is removed by the next process that writes into the folder.

    Args:
        path: The final path. Missing parent folders are created.

    Yields:
        The temporary path: an empty file, which the block writes.

    Raises:
        OutputError: When the file cannot be written.
    """
    with _replace_atomically(path, _create_file) as temp_path:
        yield temp_path


def _create_file(path: Path):
    """Create an empty file. Raise FileExistsError if the path exists."""
    path.touch(exist_ok=False)


@contextmanager
def _replace_atomically(path: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a new temporary file or folder, and rename it to `path` when the block succeeds."""
    temp_path = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_folder(path.parent)
        with hold_temp_path(path, create) as temp_path:
            _temp_paths.add(temp_path)
            yield temp_path
            if temp_path.is_file():
                with temp_path.open("rb") as temp_file:
                    # Without this, the new name could survive a power failure and its content not.
                    os.fsync(temp_file.fileno())
            os.replace(temp_path, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temp_path is not None:
            with suppress(OSError):
                temp_path.unlink()
            _temp_paths.discard(temp_path)


def _clean_folder(folder: Path):
    """Remove what killed processes left in a folder; each process looks once."""
    if folder not in _cleaned_folders:
        _cleaned_folders.add(folder)
        remove_abandoned(folder)


def remove_temp_paths():
    """Remove all unfinished files and folders, for a process that is about to end."""
    for temp_path in list(_temp_paths):
        if temp_path.is_dir():
            shutil.rmtree(temp_path, ignore_errors=True)
        else:
            temp_path.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> OutputError:
    """Return the error that reports that `path` could not be written completely."""
    if is_disk_full(error):
        remedy = "make room there and run the same command again"
    else:
        remedy = "nothing was changed"
    return OutputError(f"{path} could not be written ({error.strerror or error}): {remedy}.")


def is_disk_full(error: BaseException) -> bool:
    """Return whether a disk, a quota or the maximum file size is exhausted.

    Libraries wrap the system's error in their own, but keep at least its text.
    """
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(
        os.strerror(code) in str(error) for code in codes
    )


def read_file(path: Path) -> bytes:
    """Read a file whose path is untrusted.

    A device, or a pipe that never ends, is an error. Pipes that the shell has connected, such as
    /dev/stdin, are accepted.

    Raises:
        OSError: The path is a device or a pipe, or the file has more than `MAX_FILE_BYTES` or
            cannot be read.
    """
    mode = path.stat().st_mode
    is_connected = stat.S_ISFIFO(mode) and path.parts[:2] in (("/", "dev"), ("/", "proc"))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_connected):
        raise OSError(errno.EINVAL, "it is a device or a pipe", str(path))
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise OSError(errno.EINVAL, f"it has more than {MAX_FILE_BYTES / 1e9:.1f} GB", str(path))
    return content


def require_folder(folder: Path):
    """Raise OutputError if files cannot be put into `folder`, which need not exist yet."""
    nearest_path = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest_path.is_dir():
        raise OutputError(
            f"{nearest_path} is a file, so nothing can be written below it: give a folder."
        )


def require_file(path: Path):
    """Raise OutputError if `path` cannot be written as a file."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give the name of a file.")
    require_folder(path.absolute().parent)


def require_new_folder(path: Path):
    """Raise OutputError if `path` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} exists already: give the name of a new folder.")


def require_space(folder: Path, num_bytes: int):
    """Raise OutputError if the disk of `folder` has less than `num_bytes` free.

    What killed processes left in the folder is removed before.
    """
    while not folder.exists():
        folder = folder.parent
    _clean_folder(folder)
    num_free_bytes = shutil.disk_usage(folder).free
    if num_free_bytes < num_bytes:
        raise OutputError(
            f"{folder} has {num_free_bytes / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB are "
            "needed: make room or choose another folder."
        )


@contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` when the block succeeds.

    Raises:
        OutputError: When `path` is in use already, or cannot be written.
    """
    require_new_folder(path)
    with _replace_atomically(path, Path.mkdir) as temp_path:
        try:
            yield temp_path
        except BaseException:
            shutil.rmtree(temp_path)
            raise
        if path.is_dir():
            path.rmdir()


@contextmanager
def open_for_append(path: Path) -> Iterator[TextIO]:
    """Open a text file in UTF-8 to append to.

    Bytes of a command or a path that are not UTF-8 are written as escapes.

    Raises:
        OutputError: When it cannot be written; a part of the text may have been appended.
    """
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            yield file
    except OSError as error:
        raise write_error(path, error) from error
