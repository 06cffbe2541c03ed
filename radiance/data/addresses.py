"""Addresses of files: a local path, or a URL of a protocol that fsspec knows (s3://, https://, …).

The settings are trusted: they may name any path and protocol. Lines of lists and listings of
folders are not: `resolve_filename` checks the files that they name. "::", with which fsspec chains
protocols, has no meaning in any address.
"""

import os
import posixpath
import unicodedata
from collections.abc import Sequence

from radiance.data.unusable import UnusableError

FILE_PROTOCOL = "file"


def is_remote(address: str) -> bool:
    """Return True for a URL."""
    return "://" in address


def resolve_address(address: str) -> str:
    """Return an address that is valid in every working directory, with links resolved."""
    path = address.removeprefix("file://")
    return path if is_remote(path) else os.path.realpath(os.path.expanduser(path))


def join_address(folder: str, path: str) -> str:
    """Return the address of a path below a folder."""
    if not is_remote(folder):
        return os.path.join(folder, path)
    return f"{folder}{'' if folder.endswith('/') else '/'}{path.removeprefix('./')}"


def parent_address(address: str) -> str:
    """Return the address of the folder of a file."""
    return address[: address.rindex("/") + 1] if is_remote(address) else os.path.dirname(address)


def resolve_filename(root: str, filename: str, protocols: Sequence[str]) -> str:
    """Return the address of a file that data names.

    Args:
        root: Path or URL of the folder that relative paths are below.
        filename: A path below the root, an absolute path or a URL.
        protocols: Protocols that URLs may have. Absolute paths need the protocol "file".

    Raises:
        UnusableError: The settings do not allow such a file.
    """
    protocol, separator, path = filename.partition("://")
    if separator and protocol != FILE_PROTOCOL:
        if protocol not in protocols:
            raise UnusableError("protocol not in data.protocols", filename)
        return filename
    if separator or filename.startswith("/"):
        path = path if separator else filename
        if FILE_PROTOCOL not in protocols:
            raise UnusableError("protocol not in data.protocols", filename)
        if not path.startswith("/"):
            raise UnusableError("bad record", filename)
        return to_local_path(path)
    if posixpath.normpath(filename).split("/")[0] == "..":
        raise UnusableError("path outside of the folder", filename)
    return join_address(root, filename if is_remote(root) else to_local_path(filename))


def to_local_path(name: str) -> str:
    """Return the system's spelling of a path in UTF-8, which differs if its locale is another."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def from_local_path(path: str) -> str:
    """Return a path of the system as UTF-8, with "/" and in Unicode NFC: the same everywhere."""
    name = os.fsencode(path).decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", name.replace(os.sep, "/"))
