"""Locks on local files, which tell another process from a disk that has no locks."""

import errno
import fcntl
from collections.abc import Callable
from typing import IO

from etils import epath

from rag_mm.core import progress

_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)
# Network and FUSE disks, such as Lustre that is mounted without `flock`.
_NONE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def take(file: IO[bytes], folder: epath.PathLike, lock: Callable[[IO[bytes], int], None]) -> bool:
    """Locks an open file for this process alone, without waiting; a kill releases the lock.

    On a disk without locks nothing is locked, and a warning says so.

    Args:
        file: the file.
        folder: what the lock protects, for the warning.
        lock: `fcntl.flock`, or `fcntl.lockf` for a lock that forked children do not inherit.

    Returns:
        False if another process holds the lock.

    Raises:
        OSError: it cannot be locked for another reason.
    """
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NONE:
            raise
        progress.warn(
            f"The disk of {folder} has no locks ({error.strerror}): let no other process write there."
        )
    return True
