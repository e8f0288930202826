"""What a source brought: how much was added, how much was left out, and why."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory.store import manifest
from rag_mm.memory.writing import staging, stream

COUNTS, REJECTS = "ingest.json", "rejects.jsonl"


class TooManyRejects(UserError):
    """Nothing was written, because of these records."""

    def __init__(self, message: str, rejects: Sequence[stream.Reject]):
        super().__init__(message)
        self.rejects = rejects


def write(folder: Path, commits: Sequence[staging.Commit], max_bad: float) -> None:
    """Writes `ingest.json`, and `rejects.jsonl` where there are any, into a version's folder.

    Raises:
        TooManyRejects: more than `max_bad` of the records, and more than one, are bad; or nothing
            is left.
    """
    rejects = [reject for commit in commits for reject in commit.rejects]
    added = sum(commit.shard.rows for commit in commits)
    excluded = _added_up([commit.excluded for commit in commits])
    num_read = added + len(rejects) + sum(excluded.values())
    # One bad record says nothing about a small source; of a large one it is less than the share.
    if not added or len(rejects) > max(max_bad * num_read, 1):
        message = _complaint(num_read, added, rejects, excluded, max_bad)
        raise TooManyRejects(message, rejects)
    counts = {
        "read": num_read,
        "added": added,
        "rejected": stream.count_reasons(rejects),
        "excluded": excluded,
        "notes": _added_up([commit.notes for commit in commits]),
    }
    files.write_json(folder / COUNTS, counts)
    if rejects:
        write_rejects(folder / REJECTS, rejects)


def write_rejects(path: Path, rejects: Sequence[stream.Reject]) -> None:
    """One JSON object a line: name, reason, detail."""
    lines = [files.canonical_json(dataclasses.asdict(reject)) + "\n" for reject in rejects]
    files.write_atomic(path, "".join(lines).encode())


def read(
    root: Path, contents: manifest.MemoryManifest
) -> tuple[dict[str, Any], list[stream.Reject]]:
    """The counts and the rejects of the documents that a version brought; empty if it brought none."""
    folder = root / contents.folder
    if not (folder / COUNTS).exists():
        return {}, []
    rejects = []
    if (folder / REJECTS).exists():
        lines = (folder / REJECTS).read_text().splitlines()
        rejects = [stream.Reject(**json.loads(line)) for line in lines]
    return files.read_json(folder / COUNTS), rejects


def _complaint(
    num_read: int,
    added: int,
    rejects: Sequence[stream.Reject],
    excluded: Mapping[str, int],
    max_bad: float,
) -> str:
    if not num_read:
        return "There are no documents: a memory needs at least one."
    reasons = ", ".join(f"{count} {name}" for name, count in stream.count_reasons(rejects).items())
    first = f"; the first is {rejects[0].name}: {rejects[0].detail}" if rejects else ""
    if added:
        limit = f"more than --max-bad={max_bad:g} allows"
        return f"{len(rejects)} of {num_read} records are bad, {limit} ({reasons}){first}"
    if rejects:
        return f"There is no good record among {num_read} ({reasons}){first}"
    return f"All of the {num_read} documents were kept out ({', '.join(excluded)})."


def _added_up(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))
