"""Folders that only this user can write to, for what is used unchecked and so must be the user's own."""

import os
import pathlib
import stat


def folder(name: str) -> pathlib.Path | None:
    """`rag_mm/NAME` in XDG_CACHE_HOME, else in ~/.cache; created, for its owner alone (mode 0700).

    None where there is no home, or where the folder cannot be created or written, or belongs to someone else
    or may be written by others.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # The XDG specification says to ignore relative ones.
        home = os.environ.get("HOME", "")
        if not os.path.isabs(home):
            return None
        base = os.path.join(home, ".cache")
    path = pathlib.Path(base)
    for part in ("", "rag_mm", name):
        path /= part
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return None
        if part and not _is_private(path):
            return None
    return path if os.access(path, os.W_OK) else None


def _is_private(path: pathlib.Path) -> bool:
    """Whether a folder, no link, is the user's own and nobody else may write to it."""
    status = os.lstat(path)
    others = stat.S_IWGRP | stat.S_IWOTH
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & others
    )
