"""Edits of single files of a finished run and its memory, and the answers that each may get.

The answer follows from what the file is: part of what a stage or a version of a memory is made of, whose
digest is kept; a record beside it, which only tells times; or a mark of a process. No edit may hang or end in
anything but an answer.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

SAME, REFUSED = "the same answer", "one sentence"
# Of a stage or a checkpoint: what no digest covers, since it may differ between two runs of the same bits.
BESIDE = (
    "times.json", "speed.jsonl", "_CHECKPOINT_METADATA", "commit_success.txt",
    "checksums.json", ".memory-lock",
)  # fmt: skip
JSON_OF_A_STAGE = ("manifest.json", "times.json")


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"\1"


# Name -> the new content, made of the old one.
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one bit": _flip,
    "a byte more": lambda data: data + b"\1",
    "another JSON": lambda data: b"[3]",
    "deep JSON": lambda data: b"[" * 5000,
}
# Name -> what takes the file's place.
PLACES: dict[str, Callable[[pathlib.Path], object]] = {
    "absent": lambda path: None,
    "a folder": pathlib.Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing at all"),
    "a link to another": lambda path: path.symlink_to("/etc/hostname"),
    "a pipe": os.mkfifo,
}
KINDS = (*CONTENTS, *PLACES)


@dataclasses.dataclass(frozen=True)
class Edit:
    """One edit: a file relative to the run, and the kind of the edit."""

    file: str
    kind: str


def edits_of(run: pathlib.Path, per_file: int) -> list[Edit]:
    """Edits of all files of the run's stages, `per_file` kinds of each, in turn."""
    found = sorted(
        path.relative_to(run).as_posix()
        for path in run.glob("*/**/*")
        if path.is_file() and not path.relative_to(run).parts[0].startswith(".")
    )
    kinds = itertools.cycle(KINDS)
    edits = [Edit(file, kind) for file in found for kind in itertools.islice(kinds, per_file)]
    return [edit for edit in edits if _changes(run, edit)]


def _changes(run: pathlib.Path, edit: Edit) -> bool:
    """Whether the file differs after the edit, as an empty one that is emptied does not."""
    data = (run / edit.file).read_bytes()
    return edit.kind in PLACES or CONTENTS[edit.kind](data) != data


@contextlib.contextmanager
def applied(run: pathlib.Path, edit: Edit) -> Iterator[None]:
    """Edits the file, and restores it afterwards."""
    path = run / edit.file
    data = path.read_bytes()
    path.unlink()
    if edit.kind in CONTENTS:
        path.write_bytes(CONTENTS[edit.kind](data))
    else:
        PLACES[edit.kind](path)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def answer_of_stage(edit: Edit) -> set[str]:
    """What may be said about the edit when its stage is asked for."""
    name = pathlib.PurePath(edit.file).name
    if name == "manifest.json" and edit.file.count("/") == 1:
        return {REFUSED}
    if name in BESIDE:
        # A record may be lost; a folder, link or pipe in its place may be refused.
        return {SAME} if edit.kind in (*CONTENTS, "absent") else {SAME, REFUSED}
    # Of a store of arrays the values are digested, not the bytes of its files, some of which hold no value.
    parts = set(pathlib.PurePath(edit.file).parent.parts)
    is_of_process = any(part.startswith("ocdbt.process_") for part in parts)
    is_of_store = "d" in parts or name == "manifest.ocdbt"
    if is_of_process or (is_of_store and edit.kind in ("one bit", "a byte more")):
        return {SAME, REFUSED}
    return {REFUSED}


def exit_code_of_verify(edit: Edit) -> set[int]:
    """The exit codes that `memory verify` may have."""
    folder, _, name = edit.file.partition("/")
    assert folder == "memory"
    if name == ".memory-lock":
        return {0}
    if name not in JSON_OF_A_STAGE:
        return {1}
    # Files of the run, which the memory only expects to be JSON.
    if edit.kind in ("absent", "another JSON", "a folder"):
        return {0}
    return {0, 1} if edit.kind == "one bit" else {1}
