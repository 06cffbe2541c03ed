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
from radiance.data.catalogue import DataError

PAUSES = (1, 2, 4, 8, 15, 30)  # seconds between attempts
HEAD = 2**16  # bytes of a remote file that are fetched at a time to look at its head
STREAM = 2**23  # and to read it from its beginning to its end
# What file systems call that which changes with a file's content.
STAMPS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created")
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
NOWHERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
MOMENTARY = (408, 425, 429)  # of the HTTP status codes that blame who asks: they ask to ask later


class File(NamedTuple):
    name: str  # below its folder, with "/" and in Unicode NFC: the same everywhere
    place: str  # below its folder, as the file system spells it
    size: int | None  # bytes; none where that was not told
    stamp: str  # changes with the content; empty where there is none


class Unreachable(OSError, DataError):
    """A file that may be there and cannot be read. `errno` tells it from a broken picture."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.EIO


def is_remote(address: str) -> bool:
    return "://" in address


def absolute(address: str) -> str:
    """The same from every working directory, links resolved."""
    return address if is_remote(address) else os.path.realpath(os.path.expanduser(address))


def join(folder: str, place: str) -> str:
    """The address of a place below a folder; a place that is an address itself stays what it is."""
    if is_remote(place) or place.startswith("/"):
        return place
    if not is_remote(folder):
        return os.path.join(folder, place)
    return f"{folder}{'' if folder.endswith('/') else '/'}{place.removeprefix('./')}"


def parent(address: str) -> str:
    """The folder in which a file is."""
    return address[: address.rindex("/") + 1] if is_remote(address) else os.path.dirname(address)


def files(folder: str) -> tuple[list[File], list[str]]:
    """All files below a folder by name, and the names of folders that cannot be listed. Names that begin with a dot are passed over.

    HTTP's listings tell neither sizes nor stamps. Raises NotADirectoryError when there is no such folder, and Unreachable.
    """
    found, closed = _remote_files(folder) if is_remote(folder) else _local_files(folder)
    return sorted(found), closed


def file(address: str) -> File:
    """What is known of one file. Raises FileNotFoundError, PermissionError, Unreachable."""
    if is_remote(address):
        return _tried(address, partial(_asked, address))
    with _judged(address):
        status = os.stat(address)
    if stat.S_ISDIR(status.st_mode):
        raise _missing(address)
    return File(address, address, status.st_size, str(status.st_mtime_ns))


def read(address: str, begin: int = 0, end: int | None = None) -> bytes:
    """Bytes `begin` to `end` of a file: all, or a range that lies within it, or as much as there is of a range from its beginning.

    Raises FileNotFoundError, PermissionError, Unreachable.
    """
    if is_remote(address):
        return _tried(address, partial(_fetched, address, begin, end))
    with _judged(address), open(address, "rb") as opened:
        opened.seek(begin)
        return opened.read() if end is None else opened.read(max(end - begin, 0))


def open_head(address: str, size: int | None = None) -> BinaryIO:
    """A file to seek and read in; of a remote one little more is fetched than is read. size: where it is known, it is not asked for.

    Opening and reading raise OSError: of a remote file FileNotFoundError, PermissionError, Unreachable.
    """
    return _opened(address, size, HEAD) if is_remote(address) else open(address, "rb")


@contextmanager
def stream(address: str, size: int | None = None) -> Iterator[BinaryIO]:
    """A file to go through from its beginning; it can be sought in as well. Raises Unreachable, also when it is not there."""
    try:
        with _judged(address), _opened(address, size, STREAM) if is_remote(address) else open(address, "rb") as opened:
            yield opened
    except (FileNotFoundError, PermissionError) as error:
        raise Unreachable(f"{address} cannot be read ({error.strerror}): put it there and allow it, then start again.") from None


# --- of this machine ----------------------------------------------------------------------------------------------------


@contextmanager
def _judged(address: str) -> Iterator[None]:
    """What opening and reading a local file raises, sorted as `read` says."""
    try:
        yield
    except (PermissionError, Unreachable):
        raise
    except OSError as error:
        if error.errno in ABSENT:
            raise _missing(address) from None
        raise Unreachable(f"{address} cannot be read ({error.strerror or error}): see to its disk, then start again.") from None


def _missing(address: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address)


def _local_files(root: str) -> tuple[list[File], list[str]]:
    """A folder that is met again through a link is passed over."""
    if not os.path.isdir(root):
        raise NotADirectoryError(root)
    found, closed, met = [], [], set()

    def note(error: OSError):
        closed.append(_name(os.path.relpath(error.filename, root)))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=note):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in met:
            folders.clear()
            continue
        met.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = "" if folder == root else os.path.relpath(folder, root)
        for name in names:
            if not name.startswith("."):
                place = os.path.join(inside, name)
                try:
                    status = os.stat(os.path.join(folder, name))
                    found.append(File(_name(place), place, status.st_size, str(status.st_mtime_ns)))
                except OSError:
                    found.append(File(_name(place), place, None, ""))
    return found, closed


def _name(place: str) -> str:
    return unicodedata.normalize("NFC", place.replace(os.sep, "/"))


# --- elsewhere ----------------------------------------------------------------------------------------------------------

Answer = TypeVar("Answer")


def _tried(address: str, ask: Callable[[], Answer]) -> Answer:
    """The answer, when there is one within about a minute."""
    pauses = iter(PAUSES)
    while True:
        try:
            return ask()
        except Exception as error:  # each file system has its own kinds
            if final := _final(error, address):
                raise final from None
            if (pause := next(pauses, None)) is None:
                reason = " ".join(f"{type(error).__name__} {error}".split())
                raise Unreachable(
                    f"{address} cannot be read, tried again and again ({reason}): see to the connection, then start again."
                ) from None
        time.sleep(pause)


def _final(error: Exception, address: str) -> Exception | None:
    """What to raise at once, for it would be the same in a minute."""
    if isinstance(error, config.ConfigError | PermissionError):
        return error
    status = getattr(error, "status", None)  # of HTTP
    if status in (401, 403):
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), address)
    impossible = isinstance(error, ValueError) and not isinstance(error, OSError)  # as an address
    if isinstance(error, NOWHERE) or impossible or (status in range(400, 500) and status not in MOMENTARY):
        return _missing(address)
    return None


def _system(address: str) -> tuple[Any, str]:
    """The file system of a URL, and its name for the file."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise config.ConfigError(f"{address} is reached with the fsspec package: pip install 'radiance[remote]'.") from None
    try:
        system, path = url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise config.ConfigError(f"{address} cannot be reached: {str(error).rstrip('.')}, beside 'radiance[remote]'.") from None
    return system, system._strip_protocol(path)


def _asked(address: str) -> File:
    system, path = _system(address)
    info = system.info(path)
    if info["type"] == "directory":
        raise IsADirectoryError(address)
    return File(address, address, info.get("size"), _stamp(info))


def _fetched(address: str, begin: int, end: int | None) -> bytes:
    if end is not None and begin >= end:
        return b""
    system, path = _system(address)
    if begin == 0 and end is None:
        return system.cat_file(path)
    content = system.cat_file(path, start=begin, end=end)
    if end is not None and len(content) > end - begin:  # a server that knows no ranges sends the whole
        return content[begin:end]
    return content


def _opened(address: str, size: int | None, block: int) -> BinaryIO:
    """With its first block, so that whether it is there is known before anyone looks into it."""
    head = read(address, 0, block if size is None else min(block, size))
    return io.BytesIO(head) if len(head) < block else io.BufferedReader(_Fetched(address, size, head), block)


class _Fetched(io.RawIOBase):
    """A remote file, fetched as it is read; its head is kept."""

    def __init__(self, address: str, size: int | None, head: bytes):
        self.address, self._size, self.head, self._position = address, size, head, 0

    @property
    def size(self) -> int:
        if self._size is None:
            with suppress(FileNotFoundError):  # servers may give a file and tell nothing of it
                self._size = file(self.address).size
        if self._size is None:
            self._size = len(read(self.address))
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + (0 if whence == os.SEEK_SET else self._position if whence == os.SEEK_CUR else self.size)
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        begin, end = self._position, self._position + len(buffer)
        content = self.head[begin:end] or read(self.address, begin, min(end, self.size))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        content = self.head[self._position :]
        content += read(self.address, self._position + len(content), self.size)
        self._position += len(content)
        return content


def _remote_files(root: str) -> tuple[list[File], list[str]]:
    system, top = _tried(root, partial(_system, root))
    top = top.rstrip("/")
    system.invalidate_cache()
    found, closed, waiting = [], [], [top]
    while waiting:
        folder = waiting.pop()
        try:
            infos = _tried(root, partial(system.ls, folder, detail=True))
        except FileNotFoundError:
            if folder == top:
                raise NotADirectoryError(root) from None
            continue
        except PermissionError:
            closed.append(_name(folder[len(top) + 1 :] or "."))
            continue
        inside = [info for info in infos if info["name"].startswith(folder + "/") and info["name"].rstrip("/") != folder]
        if folder == top and infos and not inside:  # itself: a file
            raise NotADirectoryError(root)
        for info in inside:
            path = info["name"].rstrip("/")
            if path.rpartition("/")[2].startswith("."):
                continue
            if info["type"] == "directory":
                waiting.append(path)
            else:
                place = path[len(top) + 1 :]
                found.append(File(_name(place), place, info.get("size"), _stamp(info)))
    return found, closed


def _stamp(info: dict[str, Any]) -> str:
    return str(next((info[kind] for kind in STAMPS if info.get(kind)), ""))
