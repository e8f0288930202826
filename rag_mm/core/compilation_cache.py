"""Keeps compiled programs in the user's own cache folder, so that later commands start without recompiling.

A compiled program is machine code that jax loads and runs unchecked, so none is read from a run: runs are
copied, shared and downloaded.
"""

import contextlib
import os
import pathlib
import stat
import time

import jax

_MAX_AGE = 30 * 24 * 3600.0  # Seconds; nothing else bounds the size of the folder.


def keep_programs() -> None:
    """Caches programs in `user_folder()`, or where JAX_COMPILATION_CACHE_DIR or an earlier call says.

    Programs of that folder older than 30 days are deleted. Without a folder nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = user_folder()
        if folder is None:
            return
        _delete_old(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def user_folder() -> pathlib.Path | None:
    """`rag_mm/programs` in XDG_CACHE_HOME, else in ~/.cache; created, for its owner alone (mode 0700).

    None where there is no home, or where the folder cannot be created or written, or belongs to someone else
    or may be written by others.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # The XDG specification says to ignore relative ones.
        home = os.environ.get("HOME", "")
        if not os.path.isabs(home):
            return None
        base = os.path.join(home, ".cache")
    folder = pathlib.Path(base)
    for name in ("", "rag_mm", "programs"):
        folder /= name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError:
            return None
        if name and not _is_private(folder):
            return None
    return folder if os.access(folder, os.W_OK) else None


def _is_private(folder: pathlib.Path) -> bool:
    """Whether a folder, no link, is the user's own and nobody else may write to it."""
    status = os.lstat(folder)
    others = stat.S_IWGRP | stat.S_IWOTH
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & others
    )


def _delete_old(folder: pathlib.Path) -> None:
    oldest = time.time() - _MAX_AGE
    with contextlib.suppress(OSError):  # Another process may delete them at the same time.
        for entry in os.scandir(folder):
            if entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                os.unlink(entry.path)
