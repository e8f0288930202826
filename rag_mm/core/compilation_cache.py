"""Keeps compiled programs in the user's own cache folder, so that later commands start without recompiling.

A compiled program is machine code that jax loads and runs unchecked, so none is read from a run: runs are
copied, shared and downloaded.
"""

import contextlib
import os
import pathlib
import time

import jax

from rag_mm.core import user_cache

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
    """`rag_mm/programs` in the user's cache folder; None where there is none, see `user_cache.folder`."""
    return user_cache.folder("programs")


def _delete_old(folder: pathlib.Path) -> None:
    oldest = time.time() - _MAX_AGE
    with contextlib.suppress(OSError):  # Another process may delete them at the same time.
        for entry in os.scandir(folder):
            if entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                os.unlink(entry.path)
