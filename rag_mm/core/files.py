"""Atomic file writes, canonical JSON, .npy arrays and SHA-256 digests."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from rag_mm.core.errors import UserError


def write_atomic(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` atomically: a reader, or a kill at any time, finds the old file or the new one.

    The file gets the permissions of any new file, as the umask says.

    Raises:
        UserError: the folder cannot be created or written, or `path` is a link, folder, device or pipe.
    """
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.isdir(path.parent):  # Remote object stores replace objects atomically.
            path.write_bytes(data)
            return
        _refuse_unless_regular(path)
        temporary = _temporary(path)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def whole_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that is renamed to `path` on success and deleted on an exception.

    A `path` that is a link is followed: the folder is made next to what the link names.

    Raises:
        UserError: `path` is a file or a non-empty folder, or its parent cannot be written.
    """
    try:
        target = pathlib.Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{path} already exists; remove it or choose another folder.")
        temporary = pathlib.Path(_temporary(target))
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{path} cannot be created: {error.strerror or error}.") from error
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def open_lock(path: epath.PathLike) -> IO[bytes]:
    """Opens a local file to be locked, creating it empty; follows no link and empties nothing.

    Raises:
        UserError: it is a link, folder, device or pipe.
        OSError: it cannot be created or opened.
    """
    _refuse_unless_regular(path)
    # Without a wait, in case a pipe appears after the check.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


def discard(path: epath.PathLike) -> None:
    """Deletes a file, or a local or remote folder with all in it; of a link, the link alone."""
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    else:
        epath.Path(path).rmtree()


def check_room(path: pathlib.Path, num_bytes: int) -> None:
    """Checks that the disk of `path`, which need not exist, has enough free space.

    Raises:
        UserError: fewer than `num_bytes` bytes are free.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{path} needs {num_bytes / 1e9:.2f} GB, but its disk has only {free / 1e9:.2f} GB free."
        )


def _refuse_unless_regular(path: epath.PathLike) -> None:
    """Raises UserError if there is something at `path` that must be neither replaced nor followed."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise UserError(f"{path} is {what}; remove it or name another file.")


def _temporary(path: epath.PathLike) -> str:
    """A name next to `path`; what a killed process leaves is found by its form."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: epath.PathLike, value: Mapping[str, Any]) -> None:
    """Writes indented JSON atomically; NaN and infinity raise ValueError."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, text.encode())


def read_json(path: epath.PathLike) -> Any:
    """Reads JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON ({error}).") from error


def digest(data: bytes) -> str:
    """SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: epath.PathLike) -> str:
    """SHA-256 of a file's bytes in hex, read in chunks of 1 MiB."""
    sha = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def write_array(path: epath.PathLike, array: np.ndarray) -> None:
    """Writes one array as .npy, atomically; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def read_array(path: epath.PathLike) -> np.ndarray:
    """Reads a .npy file; never unpickles.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable array ({error}).") from error
