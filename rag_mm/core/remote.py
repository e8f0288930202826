"""Folders that are not on this machine's file systems: which may be used, and one sentence for the others."""

import importlib
import os

from etils import epath

from rag_mm.core.errors import UserError

_BUCKET = "gs://"


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL, such as `gs://bucket/run`, and not one of this machine's file systems."""
    return "://" in os.fspath(path)


def check_run(path: epath.PathLike) -> None:
    """Checks that a run can be kept at a path, if it is remote; does not access it.

    Raises:
        UserError: it is remote and not in a bucket of Google Cloud Storage, or the libraries that reach those
            are not installed.
    """
    path = os.fspath(path)
    if not is_remote(path):
        return
    if not path.startswith(_BUCKET) or not path.removeprefix(_BUCKET).strip("/"):
        raise UserError(
            f"{path} cannot hold a run: of remote folders only those of Google Cloud Storage can, named "
            f"{_BUCKET}BUCKET/FOLDER."
        )
    try:
        importlib.import_module("fsspec").get_filesystem_class("gcs")
        importlib.import_module("google.cloud.storage")  # Orbax asks it about the bucket.
    except ImportError as error:
        raise UserError(
            f"{path} is in a bucket, which needs pip install 'rag-mm[gcs]' ({error})."
        ) from error


def check_reached(path: epath.PathLike) -> None:
    """Checks that a remote folder can be asked for its content; it need not exist.

    Raises:
        UserError: its bucket does not exist or is not this user's, or there is no connection.
    """
    try:
        next(iter(epath.Path(path).iterdir()), None)
    except FileNotFoundError:
        return
    except Exception as error:  # The libraries of object stores raise types of their own.
        reason = f"{error}".strip().partition("\n")[0].rstrip(".")
        raise UserError(f"{path} cannot be reached ({reason or type(error).__name__}).") from error


def check_local(path: epath.PathLike) -> None:
    """Checks that a path is on a file system of this machine.

    Raises:
        UserError: it is remote.
    """
    if is_remote(path):
        raise UserError(
            f"{os.fspath(path)} is remote, as only the --workdir of rag-mm train may be; name a path of this "
            "machine, and copy from or to it, or mount the bucket."
        )
