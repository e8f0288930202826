"""The report of an ingestion: counts of added and skipped records, and why records were skipped."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory.store import manifest
from rag_mm.memory.writing import staging, stream

COUNTS, REJECTS = "ingest.json", "rejects.jsonl"


class TooManyRejects(UserError):
    """Nothing was written because too many records are bad; `rejects` lists them."""

    def __init__(self, message: str, rejects: Sequence[stream.Reject]):
        super().__init__(message)
        self.rejects = rejects


def write(folder: Path, commits: Sequence[staging.Commit], max_bad: float) -> None:
    """Writes the report of a memory's shards; see `write_counts`."""
    write_counts(
        folder,
        sum(commit.shard.rows for commit in commits),
        [reject for commit in commits for reject in commit.rejects],
        max_bad,
        excluded=sum_counts([commit.excluded for commit in commits]),
        notes=sum_counts([commit.notes for commit in commits]),
    )


def write_counts(
    folder: Path,
    added: int,
    rejects: Sequence[stream.Reject],
    max_bad: float,
    *,
    excluded: Mapping[str, int],
    notes: Mapping[str, int],
) -> None:
    """Writes `ingest.json`, and `rejects.jsonl` if there are rejects, into a folder.

    Args:
        folder: a version's folder, or a corpus.
        added: number of documents written.
        rejects: the bad records.
        max_bad: see `Raises`.
        excluded: number of good documents that were excluded, by reason.
        notes: number of written documents by note (`stream.Item.notes`).

    Raises:
        TooManyRejects: more than one record and more than the share `max_bad` are bad, or no document
            was added.
    """
    num_read = added + len(rejects) + sum(excluded.values())
    # One bad record is always tolerated: in a small source it would exceed the share by itself.
    if not added or len(rejects) > max(max_bad * num_read, 1):
        message = _message(num_read, added, rejects, excluded, max_bad)
        raise TooManyRejects(message, rejects)
    counts = {
        "read": num_read,
        "added": added,
        "rejected": stream.count_reasons(rejects),
        "excluded": dict(excluded),
        "notes": dict(notes),
    }
    files.write_json(folder / COUNTS, counts)
    if rejects:
        write_rejects(folder / REJECTS, rejects)


def write_rejects(path: Path, rejects: Sequence[stream.Reject]) -> None:
    """Writes one JSON object per line: name, reason, detail."""
    lines = [files.canonical_json(dataclasses.asdict(reject)) + "\n" for reject in rejects]
    files.write_atomic(path, "".join(lines).encode())


def read(
    root: Path, contents: manifest.MemoryManifest
) -> tuple[dict[str, Any], list[stream.Reject]]:
    """The counts and rejects of the ingestion that wrote a version; empty if no ingestion did.

    Raises:
        UserError: a file is damaged, or is not the one that the manifest lists.
    """
    folder = root / contents.folder
    for name in (f"{contents.folder}/{COUNTS}", f"{contents.folder}/{REJECTS}"):
        entry = contents.files.get(name)
        if entry and (problem := manifest.check_file(root, name, entry, deep=True)):
            raise UserError(problem)
    return read_counts(folder)


def read_counts(folder: Path) -> tuple[dict[str, Any], list[stream.Reject]]:
    """What `write_counts` wrote into a folder; empty if nothing is there.

    Raises:
        UserError: a file is damaged.
    """
    if not (folder / COUNTS).exists():
        return {}, []
    rejects = []
    if (folder / REJECTS).exists():
        lines = files.read_bytes(folder / REJECTS).splitlines()
        try:
            rejects = [stream.Reject(**files.parse_json(line)) for line in lines]
        except (TypeError, ValueError) as error:
            raise UserError(f"{folder / REJECTS} is damaged ({error}).") from error
    return files.read_object(folder / COUNTS), rejects


def _message(
    num_read: int,
    added: int,
    rejects: Sequence[stream.Reject],
    excluded: Mapping[str, int],
    max_bad: float,
) -> str:
    if not num_read:
        return "There are no documents: give at least one."
    reasons = ", ".join(f"{count} {name}" for name, count in stream.count_reasons(rejects).items())
    first = f"; the first is {rejects[0].name}: {rejects[0].detail}" if rejects else ""
    if added:
        limit = f"more than --max-bad={max_bad:g} allows"
        return f"{len(rejects)} of {num_read} records are bad, {limit} ({reasons}){first}"
    if rejects:
        return f"There is no good record among {num_read} ({reasons}){first}"
    return f"All {num_read} documents were excluded ({', '.join(excluded)})."


def sum_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Sums by name, in order of the names."""
    total: dict[str, int] = {}
    for counter in counts:
        for name, count in counter.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))
