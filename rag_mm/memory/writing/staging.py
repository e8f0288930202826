"""An unfinished version: its plan and the shards that are finished.

`begun.json` holds the plan. Each finished shard gets a commit marker, written after all its files are on
disk, with a digest of itself and of the plan. A killed writer that is started again with the same plan keeps
the committed shards up to the first whose marker or files are damaged, and resumes after them; with another
plan it starts over.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory.store import manifest
from rag_mm.memory.writing import stream

BEGUN = "begun.json"


@dataclasses.dataclass(frozen=True)
class Commit:
    """A finished shard.

    Attributes:
        shard: the shard; it has no rows if no document passed the checks and filters.
        files: its files by path relative to the memory.
        position: position in the source from which reading resumes.
        rejects: bad records read for this shard.
        excluded: number of good documents that were excluded, by reason.
        notes: number of written documents by note (`Item.notes`).
    """

    shard: manifest.Shard
    files: Mapping[str, manifest.FileEntry]
    position: int
    rejects: Sequence[stream.Reject] = ()
    excluded: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Staging:
    """The folder of the version after `previous` and its commits.

    Attributes:
        folder: its name.
        commits: commits of the finished shards, in order.
    """

    def __init__(self, root: Path, previous: manifest.MemoryManifest, plan: Mapping[str, Any]):
        """Resumes the work of a killed writer with the same plan, or starts with an empty folder.

        Args:
            root: the memory.
            previous: the manifest of the previous version.
            plan: everything that the shards depend on, JSON-serializable.
        """
        self.folder = manifest.folder_of(previous.version + 1)
        self._root = root
        self._plan = plan
        self.commits: list[Commit] = []
        if self._has_plan(plan):
            self.commits = list(self._read_commits())
            self._keep_only_commits()
        else:
            shutil.rmtree(root / self.folder, ignore_errors=True)
            (root / self.folder).mkdir()
            files.write_json(root / self.folder / BEGUN, plan)

    @property
    def position(self) -> int:
        """Position in the source from which reading resumes."""
        return self.commits[-1].position if self.commits else 0

    def commit(self, commit: Commit) -> None:
        """Marks a shard as finished; its files must already be on disk."""
        path = self._marker(len(self.commits))
        rejects = [[reject.name, reject.reason, reject.detail] for reject in commit.rejects]
        fields = {**dataclasses.asdict(commit), "rejects": rejects}
        sealed = self._digest(len(self.commits), fields)
        files.write_json(path, {"commit": fields, "sha256": sealed})
        self.commits.append(commit)

    def files(self) -> dict[str, manifest.FileEntry]:
        """All files of the shards, the plan and the commit markers."""
        markers = [self._marker(number) for number in range(len(self.commits))]
        sealed = manifest.seal_all(self._root, [self._root / self.folder / BEGUN, *markers])
        for commit in self.commits:
            sealed |= commit.files
        return sealed

    def _marker(self, number: int) -> Path:
        return self._root / self.folder / f"commit-{number:05d}.json"

    def _digest(self, number: int, fields: Mapping[str, Any]) -> str:
        return files.digest(files.canonical_json([self._plan, number, fields]).encode())

    def _has_plan(self, plan: Mapping[str, Any]) -> bool:
        try:
            return files.read_json(self._root / self.folder / BEGUN) == plan
        except UserError:  # Missing or incomplete: the folder's contents are not used.
            return False

    def _read_commits(self) -> Iterator[Commit]:
        for number in itertools.count():
            commit = self._read_commit(number)
            if commit is None or any(
                manifest.check_file(self._root, name, entry, deep=True)
                for name, entry in commit.files.items()
            ):
                return
            yield commit

    def _read_commit(self, number: int) -> Commit | None:
        """A shard's commit, or None if its marker is missing, damaged or of another format."""
        try:
            marker = files.read_json(self._marker(number))
            if marker["sha256"] == self._digest(number, marker["commit"]):
                return _parse(marker["commit"])
        except (UserError, KeyError, TypeError, ValueError):
            pass
        return None

    def _keep_only_commits(self) -> None:
        kept = {self._root / self.folder / BEGUN}
        kept |= {self._marker(number) for number in range(len(self.commits))}
        kept |= {self._root / name for commit in self.commits for name in commit.files}
        for path in (self._root / self.folder).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in kept:
                path.unlink()


def _parse(fields: dict[str, Any]) -> Commit:
    return Commit(
        **{
            **fields,
            "shard": manifest.Shard(**fields["shard"]),
            "files": {name: manifest.FileEntry(**e) for name, e in fields["files"].items()},
            "rejects": [stream.Reject(*reject) for reject in fields["rejects"]],
        }
    )
