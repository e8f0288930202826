"""Atomic file writes, canonical JSON, .npy arrays and SHA-256 digests."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core.errors import UserError


def write_atomic(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` atomically: a reader, or a kill at any time, finds the old file or the new one.

    Raises:
        UserError: the folder cannot be created or written.
    """
    path = epath.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.isdir(path.parent):  # Remote object stores replace objects atomically.
            path.write_bytes(data)
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def whole_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder that is renamed to `path` on success and deleted on an exception.

    Raises:
        UserError: `path` is a file or a non-empty folder, or its parent cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} already exists; remove it or choose another folder.")
        temporary = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise UserError(f"{path} cannot be created: {error.strerror or error}.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
