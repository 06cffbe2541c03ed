"""Files by address: a local path, or a URL of a protocol that fsspec knows.

Requests for remote files that fail for a moment are repeated with growing delays. Credentials are
read by fsspec, from its own configuration or from what each provider's tools leave in the
environment.

Local files are read with Python's own functions: fsspec's local file system has no finer time than
microseconds, and it neither follows links to folders nor reports which folders it cannot list.
Pipes and devices count as unreadable: to read them could take for ever.
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
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import fsspec
from fsspec.caching import FirstChunkCache
from fsspec.spec import AbstractBufferedFile

from radiance import config
from radiance.base.errors import DataError
from radiance.data.addresses import from_local_path, is_remote
from radiance.data.decode import MAX_FILE_BYTES
from radiance.data.unusable import UnusableError

RETRY_DELAYS = (1, 2, 4, 8, 15, 30)  # seconds between attempts
HEADER_BLOCK_SIZE = 2**16  # bytes of a remote file that are requested at once to read its header
STREAM_BLOCK_SIZE = 2**23  # the same to read the file from start to end
MAX_FOLDERS = 100_000  # of a remote folder; some servers generate folders without end
# Names under which file systems report something that changes with a file's content.
VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "last_modified"),
    *("mtime", "updated", "created"),
)
MISSING_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
MISSING_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
TRANSIENT_STATUSES = (408, 425, 429)  # HTTP status codes 4xx after which a request may be repeated


class FileInfo(NamedTuple):
    """A file below a folder.

    Attributes:
        name: Path below the folder with "/" and in Unicode NFC, the same on every system.
        path: Path below the folder in the file system's own spelling.
        size: Size in bytes; None if it is unknown.
        version: String that changes with the content; empty if there is none.
    """

    name: str
    path: str
    size: int | None
    version: str

    @property
    def state(self) -> str:
        """Size and version in one text."""
        return f"{self.size} {self.version}"


class MissingPackageError(config.ConfigError):
    """A protocol that fsspec does not know, or that needs a package that is not installed."""


class UnreachableError(OSError, DataError):
    """A file that may exist and cannot be read.

    Its `errno` distinguishes it from the errors that Pillow raises for broken images.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.EIO


def list_files(folder: str) -> tuple[list[FileInfo], list[str]]:
    """List all files below a folder; names that begin with a dot are skipped.

    Args:
        folder: Path or URL.

    Returns:
        Files ordered by name, and names of folders that cannot be listed. Listings of web servers
        have neither sizes nor versions.

    Raises:
        NotADirectoryError: There is no such folder.
        UnreachableError: The folder cannot be listed.
    """
    file_infos, unreadable_folders = (
        _list_remote_files(folder) if is_remote(folder) else _list_local_files(folder)
    )
    return sorted(file_infos), unreadable_folders


def get_file_info(address: str) -> FileInfo:
    """Return size and version of a file.

    Args:
        address: Path or URL, which is also the name and path of the result.

    Returns:
        The information.

    Raises:
        FileNotFoundError: There is no such file.
        PermissionError: This process may not read it.
        UnreachableError: It cannot be read for another reason.
    """
    if is_remote(address):
        return _retry(address, partial(_remote_file_info, address))
    with _translate_os_errors(address):
        stat_result = os.stat(address)
    if stat.S_ISDIR(stat_result.st_mode):
        raise _file_not_found(address)
    return FileInfo(address, address, stat_result.st_size, str(stat_result.st_mtime_ns))


def get_file_state(address: str) -> str:
    """Return size and version of a file, or nothing if one attempt to read it fails."""
    try:
        if is_remote(address):
            return _remote_file_info(address).state
        with _open_local(address) as file:
            file.read(1)
        return get_file_info(address).state
    except Exception:  # each file system has its own errors
        return ""


def read_bytes(address: str, begin: int = 0, end: int | None = None) -> bytes:
    """Read a range of a file.

    Args:
        address: Path or URL.
        begin: First byte.
        end: Byte after the last one; None for the end of the file. It may exceed the file only if
            `begin` is 0.

    Returns:
        The bytes.

    Raises:
        FileNotFoundError: There is no such file.
        PermissionError: This process may not read it.
        UnreachableError: It cannot be read for another reason.
    """
    if is_remote(address):
        return _retry(address, partial(_fetch_bytes, address, begin, end))
    with _translate_os_errors(address), _open_local(address) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(begin)
        return file.read(max((size if end is None else min(end, size)) - begin, 0))


def read_file(address: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a file.

    Raises:
        UnusableError: It has more than `max_bytes` bytes.
        FileNotFoundError: There is no such file.
        PermissionError: This process may not read it.
        UnreachableError: It cannot be read for another reason.
    """
    content = read_bytes(address, 0, max_bytes + 1)
    if len(content) > max_bytes:
        raise UnusableError("too large", f"more than {max_bytes} bytes")
    return content


def open_seekable(address: str, size: int | None = None) -> BinaryIO:
    """Open a file for reading at any position; a remote file is requested block by block.

    Args:
        address: Path or URL.
        size: Size in bytes, if it is known: then it is not requested.

    Returns:
        The open file.

    Raises:
        OSError: The file cannot be read, now or later. For a remote file it is FileNotFoundError,
            PermissionError or UnreachableError.
    """
    return (
        _open_remote(address, size, HEADER_BLOCK_SIZE)
        if is_remote(address)
        else _open_local(address)
    )


@contextmanager
def open_stream(address: str, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading from start to end; it is seekable too.

    Args:
        address: Path or URL.
        size: Size in bytes, if it is known: then it is not requested.

    Yields:
        The open file.

    Raises:
        UnreachableError: The file cannot be read, or there is none.
    """
    try:
        with (
            _translate_os_errors(address),
            _open_remote(address, size, STREAM_BLOCK_SIZE)
            if is_remote(address)
            else _open_local(address) as file,
        ):
            yield file
    except (FileNotFoundError, PermissionError) as error:
        raise UnreachableError(
            f"{address} cannot be read ({error.strerror}): make it readable, then start again."
        ) from None


# --- local files ----------------------------------------------------------------------------------


def _open_local(path: str) -> BinaryIO:
    """Open a regular local file. To open a pipe could block, and to open a device could act."""

    def open_without_waiting(path: str, flags: int) -> int:
        _require_regular_file(os.stat(path), path)
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        _require_regular_file(os.fstat(descriptor), path)
        return descriptor

    return open(path, "rb", opener=open_without_waiting)


def _require_regular_file(stat_result: os.stat_result, path: str):
    if stat.S_ISDIR(stat_result.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(stat_result.st_mode):
        raise PermissionError(errno.EACCES, "It is a pipe or a device", path)


@contextmanager
def _translate_os_errors(address: str) -> Iterator[None]:
    """Translate errors of local files to those that `read_bytes` documents."""
    try:
        yield
    except (PermissionError, UnreachableError):
        raise
    except OSError as error:
        if error.errno in MISSING_ERRNOS:
            raise _file_not_found(address) from None
        raise UnreachableError(
            f"{address} cannot be read ({error.strerror or error}): check its disk, "
            "then start again."
        ) from None


def _file_not_found(address: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address)


def _list_local_files(root: str) -> tuple[list[FileInfo], list[str]]:
    """List files below a folder, each linked folder once."""
    if not os.path.isdir(root):
        raise NotADirectoryError(root)
    file_infos, unreadable_folders, visited = [], [], set()

    def record_unreadable(error: OSError):
        unreadable_folders.append(from_local_path(os.path.relpath(error.filename, root)))

    walk = os.walk(root, followlinks=True, onerror=record_unreadable)
    for folder, subfolders, file_names in walk:
        try:
            stat_result = os.stat(folder)
        except OSError as error:  # it was removed meanwhile
            record_unreadable(error)
            continue
        identity = stat_result.st_dev, stat_result.st_ino
        if identity in visited:
            subfolders.clear()
            continue
        visited.add(identity)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative_folder = "" if folder == root else os.path.relpath(folder, root)
        for name in file_names:
            if not name.startswith("."):
                file_infos.append(_local_file_info(root, os.path.join(relative_folder, name)))
    return file_infos, unreadable_folders


def _local_file_info(root: str, path: str) -> FileInfo:
    """Return size and version of a file; both are empty for a broken link."""
    try:
        stat_result = os.stat(os.path.join(root, path))
    except OSError:
        return FileInfo(from_local_path(path), path, None, "")
    version = str(stat_result.st_mtime_ns)
    return FileInfo(from_local_path(path), path, stat_result.st_size, version)


# --- remote files ---------------------------------------------------------------------------------

Response = TypeVar("Response")


def _retry(address: str, request: Callable[[], Response]) -> Response:
    """Repeat a request until it succeeds, for about a minute."""
    delays = iter(RETRY_DELAYS)
    while True:
        try:
            return request()
        except Exception as error:  # each file system has its own errors
            if permanent_error := _permanent_error(error, address):
                raise permanent_error from None
            if (delay := next(delays, None)) is None:
                reason = " ".join(f"{type(error).__name__} {error}".split())
                raise UnreachableError(
                    f"{address} cannot be read, after {len(RETRY_DELAYS) + 1} attempts "
                    f"({reason}): check the connection, then start again."
                ) from None
        time.sleep(delay)


def _permanent_error(error: Exception, address: str) -> Exception | None:
    """Return the error to raise at once, or None if a later attempt may succeed."""
    if isinstance(error, config.ConfigError | PermissionError):
        return error
    status = getattr(error, "status", None)  # HTTP status code
    if status in (401, 403):
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), address)
    is_invalid_address = isinstance(error, ValueError) and not isinstance(error, OSError)
    is_client_error = status in range(400, 500) and status not in TRANSIENT_STATUSES
    if isinstance(error, MISSING_ERRORS) or is_invalid_address or is_client_error:
        return _file_not_found(address)
    return None


def _open_file_system(address: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the file's path in it.

    fsspec's own function is not used: in it, "::" opens file systems within others, which interpret
    the content of files.
    """
    protocol = address.partition("://")[0]
    try:
        options = fsspec.get_filesystem_class(protocol)._get_kwargs_from_urls(address)
        file_system = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError, TypeError) as error:  # no package or no such protocol
        raise MissingPackageError(
            f"{address} cannot be reached: {str(error).rstrip('.')}."
        ) from None
    return file_system, file_system._strip_protocol(address)


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
    if end is not None and len(content) > end - begin:
        return content[begin:end]  # a server that ignores ranges sent the whole file
    return content


def _open_remote(address: str, size: int | None, block_size: int) -> BinaryIO:
    """Open a remote file and read its first block, so that a missing file fails at once."""
    first_block = read_bytes(address, 0, block_size if size is None else min(block_size, size))
    if len(first_block) < block_size:
        return io.BytesIO(first_block)
    size = _remote_size(address) if size is None else size
    remote_file = _RemoteFile(address, size, first_block)
    return io.BufferedReader(cast(io.RawIOBase, remote_file), block_size)


def _remote_size(address: str) -> int:
    """Return the size of a remote file; if the server does not report it, read the file."""
    size = None
    with suppress(FileNotFoundError):  # some servers send a file and have no information about it
        size = get_file_info(address).size
    return len(read_bytes(address)) if size is None else size


class _RemoteFile(AbstractBufferedFile):
    """A remote file with our retries, whose first block stays in memory."""

    def __init__(self, address: str, size: int, first_block: bytes):
        super().__init__(None, address, cache_type="none", size=size)
        cache = FirstChunkCache(len(first_block), self._fetch_range, size)
        cache.cache = first_block
        self.cache = cache

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_bytes(self.path, start, end)


def _list_remote_files(root: str) -> tuple[list[FileInfo], list[str]]:
    """List files below a folder, level by level."""
    file_system, root_path = _retry(root, partial(_open_file_system, root))
    root_path = root_path.rstrip("/")
    file_system.invalidate_cache()
    file_infos, unreadable_folders, pending, num_folders = [], [], [root_path], 0
    while pending:
        folder, num_folders = pending.pop(), num_folders + 1
        if num_folders > MAX_FOLDERS:
            raise DataError(
                f"{root} has more than {MAX_FOLDERS:,} folders: name its images in a list "
                "(data.source=jsonl)."
            )
        try:
            infos = _retry(root, partial(file_system.ls, folder, detail=True))
        except FileNotFoundError:
            if folder == root_path:
                raise NotADirectoryError(root) from None
            continue
        except PermissionError:
            unreadable_folders.append(
                unicodedata.normalize("NFC", folder[len(root_path) + 1 :] or ".")
            )
            continue
        entries = [
            info
            for info in infos
            if info["name"].startswith(folder + "/") and info["name"].rstrip("/") != folder
        ]
        if folder == root_path and infos and not entries:  # the listing of a file is the file
            raise NotADirectoryError(root)
        for info in entries:
            path = info["name"].rstrip("/")
            if path.rpartition("/")[2].startswith("."):
                continue
            if info["type"] == "directory":
                pending.append(path)
            else:
                name = path[len(root_path) + 1 :]
                version = _file_version(info)
                normalized_name = unicodedata.normalize("NFC", name)
                file_infos.append(FileInfo(normalized_name, name, info.get("size"), version))
    return file_infos, unreadable_folders


def _file_version(info: dict[str, Any]) -> str:
    """Return the first value that changes with the content."""
    return str(next((info[key] for key in VERSION_KEYS if info.get(key)), ""))
