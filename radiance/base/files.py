"""Write files and folders atomically, and check paths and disk space before any work."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from radiance.base.errors import CheckpointError


@contextmanager
def replace_atomically(path: Path):
    """A temporary file beside `path` that takes its name when the block ends well, and is gone when it does not."""
    temp_path = path.with_name(f".{path.name}.{os.getpid()}.part")
    _temp_paths.add(temp_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp_path
        if temp_path.is_file():
            with temp_path.open("rb") as temp_file:
                os.fsync(
                    temp_file.fileno()
                )  # or a name could outlive a power cut without what it names
        os.replace(temp_path, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):
            temp_path.unlink()
        _temp_paths.discard(temp_path)


_temp_paths: set[Path] = set()  # files and folders inside `replacing`


def remove_temp_paths():
    """Removes what `replacing` would, for a process that is about to end."""
    for temp_path in list(_temp_paths):
        if temp_path.is_dir():
            shutil.rmtree(temp_path, ignore_errors=True)
        else:
            temp_path.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What to say of a file that could not be written whole."""
    remedy = (
        "make room there and give the same command again"
        if is_disk_full(error)
        else "nothing was changed"
    )
    return CheckpointError(f"{path} could not be written ({error.strerror or error}): {remedy}.")


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, a quota, or what a file may grow to is used up; what libraries make of it keeps at least the system's words."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(
        os.strerror(code) in str(error) for code in codes
    )


def require_folder(folder: Path):
    """Raises CheckpointError when files could not be put into `folder`, which need not be there yet."""
    nearest_path = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest_path.is_dir():
        raise CheckpointError(
            f"{nearest_path} is a file, and nothing can be written below it: give a folder."
        )


def require_file(path: Path):
    """Raises CheckpointError when `path` could not be written as a file."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the name of a file.")
    require_folder(path.absolute().parent)


def require_space(directory: Path, required_bytes: int):
    """Raises CheckpointError when `directory` has not `needed` bytes free."""
    while not directory.exists():
        directory = directory.parent
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < required_bytes:
        raise CheckpointError(
            f"{directory} has {free_bytes / 1e9:.2f} GB free, and {required_bytes / 1e9:.2f} GB are needed: make room or choose another directory."
        )


def require_new_folder(path: Path):
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is there already: give the name of a new folder.")


@contextmanager
def create_folder_atomically(path: Path):
    """A temporary folder beside `path` that takes its name when the block ends well, and is gone when it does not."""
    require_new_folder(path)
    with replace_atomically(path) as temp_path:
        temp_path.mkdir()
        try:
            yield temp_path
        except BaseException:
            shutil.rmtree(temp_path)
            raise
        if path.is_dir():
            path.rmdir()


@contextmanager
def open_for_append(path: Path) -> Iterator[TextIO]:
    """A file to write more into. Raises CheckpointError when it cannot be written, and then a part of it may be."""
    try:
        with path.open("a") as file:
            yield file
    except OSError as error:
        raise write_error(path, error) from error
