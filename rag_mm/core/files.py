"""Atomic file writes, canonical JSON, .npy arrays and SHA-256 digests."""

import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from typing import IO, Any, NoReturn

import numpy as np
from etils import epath

from rag_mm.core import remote
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
        if remote.is_remote(path):  # Object stores replace objects atomically.
            path.write_bytes(data)
            return
        with whole_file(path) as temporary, open(temporary, "xb") as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def whole_file(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary name in the folder of `path`, a local file; what is written there replaces it.

    On an exception what is at `path` stays as it was.

    Raises:
        UserError: `path` is a link, folder, device or pipe.
        OSError: nothing was written, or it cannot be moved to `path`.
    """
    _refuse_unless_regular(path)
    temporary = pathlib.Path(_temporary(path))
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


_MAX_DIGITS = 300  # A float holds larger integers, too.
_MAX_DEPTH = 100  # Far from Python's limit, since what is read is walked by recursive functions.


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: epath.PathLike, value: Mapping[str, Any]) -> None:
    """Writes indented JSON atomically; NaN and infinity raise ValueError."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, text.encode())


def parse_json(text: str | bytes) -> Any:
    """Parses JSON of any origin.

    Raises:
        ValueError: it is not JSON or not UTF-8, is nested too deeply, or holds NaN, an infinity or a number
            beyond the range of a float.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite, parse_int=_int)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for each in level
            for item in (each.values() if isinstance(each, dict) else each)
            if isinstance(item, dict | list)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not a number in JSON")


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"{digits[:20]}.. is beyond the range of a number")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is beyond the range of a number")
    return value


def read_json(path: epath.PathLike) -> Any:
    """Reads JSON; nothing that it says is trusted, see `parse_json`.

    Raises:
        UserError: the file is missing, no regular file, or not JSON of finite numbers.
    """
    path = epath.Path(path)
    try:
        return parse_json(read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable JSON ({error}).") from error


def read_object(path: epath.PathLike, **types: type) -> dict[str, Any]:
    """Reads a JSON object; `types` are those of keys that it must have, such as `captions=list`.

    Raises:
        UserError: as `read_json`; or it is no object, or a key is missing or of another type.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object.")
    for key, kind in types.items():
        if not isinstance(values.get(key), kind):
            raise UserError(f"{path} is damaged: its {key!r} is missing or no {kind.__name__}.")
    return values


def is_special(path: epath.PathLike) -> bool:
    """Whether a local path leads to a device, pipe or socket, which may never end."""
    if remote.is_remote(path) or not os.path.exists(path):
        return False
    mode = os.stat(path).st_mode
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def refuse_special(path: epath.PathLike) -> None:
    """Ensures that reading a path ends.

    Raises:
        UserError: it leads to a device, pipe or socket.
    """
    if is_special(path):
        raise UserError(f"{os.fspath(path)} is a device or a pipe, not a file.")


def read_bytes(path: epath.PathLike) -> bytes:
    """The bytes of a file of unknown origin.

    Raises:
        UserError: it is a device, pipe or socket.
        OSError: it cannot be read.
    """
    refuse_special(path)
    return epath.Path(path).read_bytes()


def digest(data: bytes) -> str:
    """SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: epath.PathLike) -> str:
    """SHA-256 of a file's bytes in hex, read in chunks of 1 MiB.

    Raises:
        UserError: it is a device, pipe or socket.
    """
    refuse_special(path)
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
        return np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable array ({error}).") from error
