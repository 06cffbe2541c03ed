"""Locks of files by the operating system (flock), which end with the process however it ends."""

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until its descriptor is closed, without waiting.

    Returns:
        True if it is locked now, False if another process has locked it, None if the system or the
        disk has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # for example ENOLCK, EOPNOTSUPP
        return None
    return True
