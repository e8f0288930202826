"""A list of the SHA-256 of every file in a folder, kept in the folder, to find damage before it is read."""

from collections.abc import Iterator
from typing import Any

from etils import epath

from rag_mm.core import files
from rag_mm.core.errors import UserError

NAME = "checksums.json"
_ALGORITHM = "sha256"


def write(folder: epath.PathLike) -> None:
    """Lists all files below `folder` in `folder/checksums.json`, atomically; call it when all are complete.

    Raises:
        UserError: the list cannot be written.
    """
    folder = epath.Path(folder)
    listed = {name: files.file_digest(folder / name) for name in sorted(_names(folder))}
    files.write_json(folder / NAME, {"algorithm": _ALGORITHM, "files": listed})


def exists(folder: epath.PathLike) -> bool:
    """Whether the folder has a list."""
    return (epath.Path(folder) / NAME).exists()


def check(folder: epath.PathLike, part: int = 0, num_parts: int = 1) -> None:
    """Compares the files with the list.

    Args:
        folder: a folder with a list.
        part, num_parts: only every `num_parts`-th file is read, from number `part` on, so that several
            processes can share the work; all of them see whether a file is missing.

    Raises:
        UserError: a file is missing or differs, or the list itself is damaged.
    """
    folder = epath.Path(folder)
    listed = _read(folder)
    missing = sorted(listed.keys() - set(_names(folder)))
    if missing:
        raise UserError(f"{folder / missing[0]} is missing.")
    for name in sorted(listed)[part::num_parts]:
        if files.file_digest(folder / name) != listed[name]:
            raise UserError(f"{folder / name} differs from its checksum.")


def _read(folder: epath.Path) -> dict[str, str]:
    content: Any = files.read_json(folder / NAME)
    listed = content.get("files") if isinstance(content, dict) else None
    if not listed or not isinstance(listed, dict) or content.get("algorithm") != _ALGORITHM:
        raise UserError(f"{folder / NAME} is not a list of SHA-256 checksums.")
    return listed


def _names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Relative paths of all files but the list, and those that an atomic write has not finished."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _names(entry, f"{prefix}{entry.name}/")
        elif prefix or not entry.name.startswith((NAME, f".{NAME}")):
            yield f"{prefix}{entry.name}"
