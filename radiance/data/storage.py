"""Files under an address: a path of this machine, or a URL that fsspec understands (s3://, gs://, https://, memory://, …).

What is asked of a remote file is asked again, with growing pauses, when it fails for a moment. How to log in is fsspec's to know: from
its own configuration, or from what each provider's tools leave in the environment.
"""

import errno
import io
import os
import stat
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeVar

from radiance import config
from radiance.base.errors import DataError

RETRY_DELAYS = (1, 2, 4, 8, 15, 30)  # seconds between attempts
HEADER_BLOCK_SIZE = 2**16  # bytes of a remote file that are fetched at a time to look at its head
STREAM_BLOCK_SIZE = 2**23  # and to read it from its beginning to its end
# What file systems call that which changes with a file's content.
VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)
MISSING_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
MISSING_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
TRANSIENT_STATUSES = (
    408,
    425,
    429,
)  # of the HTTP status codes that blame who asks: they ask to ask later


class FileInfo(NamedTuple):
    name: str  # below its folder, with "/" and in Unicode NFC: the same everywhere
    path: str  # below its folder, as the file system spells it
    size: int | None  # bytes; none where that was not told
    version: str  # changes with the content; empty where there is none


class UnreachableError(OSError, DataError):
    """A file that may be there and cannot be read. `errno` tells it from a broken image."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.EIO


def is_remote(address: str) -> bool:
    return "://" in address


def resolve_address(address: str) -> str:
    """The same from every working directory, links resolved."""
    return address if is_remote(address) else os.path.realpath(os.path.expanduser(address))


def join_address(folder: str, path: str) -> str:
    """The address of a place below a folder; a place that is an address itself stays what it is."""
    if is_remote(path) or path.startswith("/"):
        return path
    if not is_remote(folder):
        return os.path.join(folder, path)
    return f"{folder}{'' if folder.endswith('/') else '/'}{path.removeprefix('./')}"


def parent_address(address: str) -> str:
    """The folder in which a file is."""
    return address[: address.rindex("/") + 1] if is_remote(address) else os.path.dirname(address)


def list_files(folder: str) -> tuple[list[FileInfo], list[str]]:
    """All files below a folder by name, and the names of folders that cannot be listed. Names that begin with a dot are passed over.

    HTTP's listings tell neither sizes nor stamps. Raises NotADirectoryError when there is no such folder, and Unreachable.
    """
    file_infos, unreadable_folders = (
        _list_remote_files(folder) if is_remote(folder) else _list_local_files(folder)
    )
    return sorted(file_infos), unreadable_folders


def get_file_info(address: str) -> FileInfo:
    """What is known of one file. Raises FileNotFoundError, PermissionError, Unreachable."""
    if is_remote(address):
        return _retry(address, partial(_remote_file_info, address))
    with _translate_os_errors(address):
        stat_result = os.stat(address)
    if stat.S_ISDIR(stat_result.st_mode):
        raise _file_not_found(address)
    return FileInfo(address, address, stat_result.st_size, str(stat_result.st_mtime_ns))


def read_bytes(address: str, begin: int = 0, end: int | None = None) -> bytes:
    """Bytes `begin` to `end` of a file: all, or a range that lies within it, or as much as there is of a range from its beginning.

    Raises FileNotFoundError, PermissionError, Unreachable.
    """
    if is_remote(address):
        return _retry(address, partial(_fetch_bytes, address, begin, end))
    with _translate_os_errors(address), open(address, "rb") as handle:
        handle.seek(begin)
        return handle.read() if end is None else handle.read(max(end - begin, 0))


def open_seekable(address: str, size: int | None = None) -> BinaryIO:
    """A file to seek and read in; of a remote one little more is fetched than is read. size: where it is known, it is not asked for.

    Opening and reading raise OSError: of a remote file FileNotFoundError, PermissionError, Unreachable.
    """
    return (
        _open_remote(address, size, HEADER_BLOCK_SIZE)
        if is_remote(address)
        else open(address, "rb")
    )


@contextmanager
def open_stream(address: str, size: int | None = None) -> Iterator[BinaryIO]:
    """A file to go through from its beginning; it can be sought in as well. Raises Unreachable, also when it is not there."""
    try:
        with (
            _translate_os_errors(address),
            _open_remote(address, size, STREAM_BLOCK_SIZE)
            if is_remote(address)
            else open(address, "rb") as handle,
        ):
            yield handle
    except (FileNotFoundError, PermissionError) as error:
        raise UnreachableError(
            f"{address} cannot be read ({error.strerror}): put it there and allow it, then start again."
        ) from None


# --- of this machine ----------------------------------------------------------------------------------------------------


@contextmanager
def _translate_os_errors(address: str) -> Iterator[None]:
    """What opening and reading a local file raises, sorted as `read` says."""
    try:
        yield
    except (PermissionError, UnreachableError):
        raise
    except OSError as error:
        if error.errno in MISSING_ERRNOS:
            raise _file_not_found(address) from None
        raise UnreachableError(
            f"{address} cannot be read ({error.strerror or error}): see to its disk, then start again."
        ) from None


def _file_not_found(address: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address)


def _list_local_files(root: str) -> tuple[list[FileInfo], list[str]]:
    """A folder that is met again through a link is passed over."""
    if not os.path.isdir(root):
        raise NotADirectoryError(root)
    file_infos, unreadable_folders, visited = [], [], set()

    def record_unreadable(error: OSError):
        unreadable_folders.append(_normalize_name(os.path.relpath(error.filename, root)))

    for folder, subfolders, file_names in os.walk(
        root, followlinks=True, onerror=record_unreadable
    ):
        stat_result = os.stat(folder)
        if (stat_result.st_dev, stat_result.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((stat_result.st_dev, stat_result.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative_folder = "" if folder == root else os.path.relpath(folder, root)
        for name in file_names:
            if not name.startswith("."):
                path = os.path.join(relative_folder, name)
                try:
                    stat_result = os.stat(os.path.join(folder, name))
                    file_infos.append(
                        FileInfo(
                            _normalize_name(path),
                            path,
                            stat_result.st_size,
                            str(stat_result.st_mtime_ns),
                        )
                    )
                except OSError:
                    file_infos.append(FileInfo(_normalize_name(path), path, None, ""))
    return file_infos, unreadable_folders


def _normalize_name(path: str) -> str:
    return unicodedata.normalize("NFC", path.replace(os.sep, "/"))


# --- elsewhere ----------------------------------------------------------------------------------------------------------

Response = TypeVar("Response")


def _retry(address: str, request: Callable[[], Response]) -> Response:
    """The answer, when there is one within about a minute."""
    delays = iter(RETRY_DELAYS)
    while True:
        try:
            return request()
        except Exception as error:  # each file system has its own kinds
            if permanent_error := _permanent_error(error, address):
                raise permanent_error from None
            if (delay := next(delays, None)) is None:
                reason = " ".join(f"{type(error).__name__} {error}".split())
                raise UnreachableError(
                    f"{address} cannot be read, tried again and again ({reason}): see to the connection, then start again."
                ) from None
        time.sleep(delay)


def _permanent_error(error: Exception, address: str) -> Exception | None:
    """What to raise at once, for it would be the same in a minute."""
    if isinstance(error, config.ConfigError | PermissionError):
        return error
    status = getattr(error, "status", None)  # of HTTP
    if status in (401, 403):
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), address)
    is_invalid_address = isinstance(error, ValueError) and not isinstance(
        error, OSError
    )  # as an address
    if (
        isinstance(error, MISSING_ERRORS)
        or is_invalid_address
        or (status in range(400, 500) and status not in TRANSIENT_STATUSES)
    ):
        return _file_not_found(address)
    return None


def _open_file_system(address: str) -> tuple[Any, str]:
    """The file system of a URL, and its name for the file."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise config.ConfigError(
            f"{address} is reached with the fsspec package: pip install 'radiance[remote]'."
        ) from None
    try:
        file_system, path = url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise config.ConfigError(
            f"{address} cannot be reached: {str(error).rstrip('.')}, beside 'radiance[remote]'."
        ) from None
    return file_system, file_system._strip_protocol(path)


def _remote_file_info(address: str) -> FileInfo:
    file_system, path = _open_file_system(address)
    info = file_system.info(path)
    if info["type"] == "directory":
        raise IsADirectoryError(address)
    return FileInfo(address, address, info.get("size"), _file_version(info))


def _fetch_bytes(address: str, begin: int, end: int | None) -> bytes:
    if end is not None and begin >= end:
        return b""
    file_system, path = _open_file_system(address)
    if begin == 0 and end is None:
        return file_system.cat_file(path)
    content = file_system.cat_file(path, start=begin, end=end)
    if (
        end is not None and len(content) > end - begin
    ):  # a server that knows no ranges sends the whole
        return content[begin:end]
    return content


def _open_remote(address: str, size: int | None, block_size: int) -> BinaryIO:
    """With its first block, so that whether it is there is known before anyone looks into it."""
    first_block = read_bytes(address, 0, block_size if size is None else min(block_size, size))
    return (
        io.BytesIO(first_block)
        if len(first_block) < block_size
        else io.BufferedReader(_RemoteFile(address, size, first_block), block_size)
    )


class _RemoteFile(io.RawIOBase):
    """A remote file, fetched as it is read; its head is kept."""

    def __init__(self, address: str, size: int | None, first_block: bytes):
        self.address, self._size, self.first_block, self._position = address, size, first_block, 0

    @property
    def size(self) -> int:
        if self._size is None:
            with suppress(FileNotFoundError):  # servers may give a file and tell nothing of it
                self._size = get_file_info(self.address).size
        if self._size is None:
            self._size = len(read_bytes(self.address))
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + (
            0 if whence == os.SEEK_SET else self._position if whence == os.SEEK_CUR else self.size
        )
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        begin, end = self._position, self._position + len(buffer)
        content = self.first_block[begin:end] or read_bytes(
            self.address, begin, min(end, self.size)
        )
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        content = self.first_block[self._position :]
        content += read_bytes(self.address, self._position + len(content), self.size)
        self._position += len(content)
        return content


def _list_remote_files(root: str) -> tuple[list[FileInfo], list[str]]:
    file_system, root_path = _retry(root, partial(_open_file_system, root))
    root_path = root_path.rstrip("/")
    file_system.invalidate_cache()
    file_infos, unreadable_folders, pending = [], [], [root_path]
    while pending:
        folder = pending.pop()
        try:
            infos = _retry(root, partial(file_system.ls, folder, detail=True))
        except FileNotFoundError:
            if folder == root_path:
                raise NotADirectoryError(root) from None
            continue
        except PermissionError:
            unreadable_folders.append(_normalize_name(folder[len(root_path) + 1 :] or "."))
            continue
        entries = [
            info
            for info in infos
            if info["name"].startswith(folder + "/") and info["name"].rstrip("/") != folder
        ]
        if folder == root_path and infos and not entries:  # itself: a file
            raise NotADirectoryError(root)
        for info in entries:
            path = info["name"].rstrip("/")
            if path.rpartition("/")[2].startswith("."):
                continue
            if info["type"] == "directory":
                pending.append(path)
            else:
                relative_path = path[len(root_path) + 1 :]
                file_infos.append(
                    FileInfo(
                        _normalize_name(relative_path),
                        relative_path,
                        info.get("size"),
                        _file_version(info),
                    )
                )
    return file_infos, unreadable_folders


def _file_version(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in VERSION_KEYS if info.get(key)), ""))
