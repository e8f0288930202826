"""Content digests of all files in a folder: equal content gives equal digests in every run."""

import fnmatch
import functools
import os
import time
from collections.abc import Callable, Iterator

import tensorstore
from etils import epath

from rag_mm.core import checksums, files, remote
from rag_mm.core.errors import UserError

# Orbax keeps the arrays of a save in an OCDBT store whose files have random names, next to files with
# times and paths. So the arrays are read from the store, and those files are skipped; so is the list of their
# checksums.
_STORE = "manifest.ocdbt"
_STORE_FILES = (_STORE, "d", "ocdbt.process_*")
_METADATA_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt", checksums.NAME)
# Left by a process that was killed during a save or an atomic write.
_UNFINISHED = ("*.orbax-checkpoint-tmp*", ".*")
_SETTLED_NS = 2 * 10**9


def folder_digests(folder: epath.PathLike, exclude: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by relative path; an Orbax array store counts as one file.

    Names in `exclude` are skipped at the top level, names that start with a dot at every level.

    Raises:
        UserError: a file or an array store cannot be read, or would never end.
    """
    entries = [entry for entry in epath.Path(folder).iterdir() if entry.name not in exclude]
    return dict(sorted(_walk(entries, "")))


def of_files(path: epath.PathLike, make: Callable[[epath.Path], str]) -> str:
    """`make(path)`, a digest of the files at or below a local path, once in a process unless they change.

    `make` is a function of a module, which returns the same for the same files.
    """
    path = epath.Path(path)
    stamps = _stamps(path)
    # A file that was written just now may change again without another time.
    if not stamps or max(times[-1] for times in stamps) > time.time_ns() - _SETTLED_NS:
        return make(path)
    return _known(path, make, stamps)


def _stamps(path: epath.Path) -> tuple[tuple[int, int, int], ...]:
    """(inode, size, time of the last change in ns) of the local files at or below a path; else ()."""
    folders = os.walk(path, followlinks=True) if path.is_dir() else [("", (), (str(path),))]
    found = [os.path.join(folder, name) for folder, _, names in folders for name in names]
    if not all(map(os.path.exists, found)):
        return ()
    stats = [os.stat(name) for name in sorted(found)]
    return tuple(
        (each.st_ino, each.st_size, max(each.st_mtime_ns, each.st_ctime_ns)) for each in stats
    )


@functools.lru_cache(maxsize=32)
def _known(
    path: epath.Path,
    make: Callable[[epath.Path], str],
    stamps: tuple[tuple[int, int, int], ...],
) -> str:
    del stamps  # Files with other ones have another digest.
    return make(path)


def _walk(entries: list[epath.Path], prefix: str) -> Iterator[tuple[str, str]]:
    skipped: tuple[str, ...] = _METADATA_FILES + _UNFINISHED
    if any(entry.name == _STORE for entry in entries):
        skipped += _STORE_FILES
        yield f"{prefix}arrays", _store_digest(entries[0].parent)
    for entry in entries:
        if any(fnmatch.fnmatch(entry.name, pattern) for pattern in skipped):
            continue
        if entry.is_dir():
            yield from _walk(list(entry.iterdir()), f"{prefix}{entry.name}/")
        else:
            try:
                yield f"{prefix}{entry.name}", files.file_digest(entry)
            except OSError as error:  # Such as a link to nothing.
                raise UserError(f"{entry} cannot be read ({error.strerror}).") from error


def _store_digest(folder: epath.Path) -> str:
    for place, _, names in os.walk(folder):  # Of a remote folder, nothing.
        for name in names:
            files.refuse_special(os.path.join(place, name))  # TensorStore would wait for ever.
    # A value in the store is an encoded chunk or its metadata; both depend only on the array.
    try:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": _location(folder)}).result()
        entries = [
            key + b" " + files.digest(store.read(key).result().value).encode()
            for key in sorted(store.list().result())
        ]
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"The arrays in {folder} cannot be read ({reason}).") from error
    return files.digest(b"\n".join(entries))


def _location(folder: epath.Path) -> str | dict[str, str]:
    # A local path is no URL: `#`, `?` and `%` are characters of its names.
    if remote.is_remote(folder):
        return f"{folder}/"
    return {"driver": "file", "path": f"{os.path.abspath(folder)}/"}
