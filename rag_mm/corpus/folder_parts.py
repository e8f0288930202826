"""Numbered parts of a folder, shared by processes: each is marked when it is whole, and else made again.

A part depends on the plan and its number alone. So processes need not speak with each other, the files are
the same for any number of them, and a killed command that is started again makes only the parts without a
mark.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rag_mm.core import files, locks, processes
from rag_mm.core.errors import UserError
from rag_mm.memory.store import manifest

PLAN, SHARDS, LOCK = "begun.json", "shards", ".corpus-lock"
# A part's number -> what its mark says, JSON-serializable, and its files.
Make = Callable[[int], tuple[dict[str, Any], Sequence[Path]]]


def run(root: Path, plan: Mapping[str, Any], total: int, make: Make) -> list[dict[str, Any]] | None:
    """Makes the parts in `root`/shards that are missing, each process its share; every process calls it.

    Args:
        root: the folder.
        plan: everything that the parts depend on, JSON-serializable; parts of another plan are deleted.
        total: number of parts.
        make: makes one; it writes whole files (`files.whole_file`).

    Returns:
        In process 0: what the marks say, with the sizes and digests of their files as `files`. Else None.
    """
    parts = root / SHARDS
    if jax.process_index() == 0:
        _begin(root, parts, plan)
    processes.broadcast_from_leader("begun")
    for number in range(jax.process_index(), total, jax.process_count()):
        if _read(root, parts, plan, number, deep=True) is None:
            _mark(parts, number).unlink(missing_ok=True)
            fields, paths = make(number)
            sealed = {name: vars(entry) for name, entry in manifest.seal_all(root, paths).items()}
            _write(parts, plan, number, {**fields, "files": sealed})
    processes.wait_for_others()
    if jax.process_index():
        return None
    marks = [_read(root, parts, plan, number, deep=False) for number in range(total)]
    if missing := [number for number, mark in enumerate(marks) if mark is None]:
        raise UserError(
            f"Part {missing[0]} of {parts} is missing or damaged; run the command again, in folders that all "
            "processes share."
        )
    return [mark for mark in marks if mark is not None]


@contextlib.contextmanager
def lock(root: Path) -> Iterator[None]:
    """Holds the folder for one command, in process 0; a kill releases it.

    Raises:
        UserError: the folder cannot be written, or another command is writing to it.
    """
    if jax.process_index():
        yield
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = files.open_lock(root / LOCK)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}.") from error
    with file:
        if not locks.take(file, root, fcntl.flock):
            raise UserError(f"Another process is writing {root}: try again when it has finished.")
        yield


def _begin(root: Path, parts: Path, plan: Mapping[str, Any]) -> None:
    try:
        is_known = files.read_json(root / PLAN) == plan
    except UserError:
        is_known = False
    if not is_known:
        shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True, exist_ok=True)
    for unfinished in parts.glob(".*"):
        unfinished.unlink()
    files.write_json(root / PLAN, plan)


def _mark(parts: Path, number: int) -> Path:
    return parts / f"commit-{number:05d}.json"


def _write(parts: Path, plan: Mapping[str, Any], number: int, fields: dict[str, Any]) -> None:
    files.write_json(
        _mark(parts, number), {"commit": fields, "sha256": _digest(plan, number, fields)}
    )


def _read(
    root: Path, parts: Path, plan: Mapping[str, Any], number: int, deep: bool
) -> dict[str, Any] | None:
    """What a part's mark says; None if it is missing, of another plan, or not of the files that are there."""
    try:
        mark = files.read_json(_mark(parts, number))
        fields = mark["commit"]
        if mark["sha256"] != _digest(plan, number, fields):
            return None
        entries = {name: manifest.FileEntry(**e) for name, e in fields["files"].items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return None
    problems = [manifest.check_file(root, name, entry, deep) for name, entry in entries.items()]
    return None if any(problems) else fields


def _digest(plan: Mapping[str, Any], number: int, fields: Any) -> str:
    return files.digest(files.canonical_json([plan, number, fields]).encode())
