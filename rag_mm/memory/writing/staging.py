"""A version in the making: what it is made of, and which of its shards are done.

`begun.json` says what is being made from what. Each finished shard gets a commit marker, written
after all its files are on the disk. A killed writer that is started again with the same plan keeps
the committed shards and reads on behind them; with another plan it starts anew.
"""

import dataclasses
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
        shard: the shard; without rows where nothing good was left to write.
        files: its files by path relative to the memory.
        position: where the source is read on.
        rejects: bad records met on the way.
        excluded: how many good ones were kept out, by reason.
        notes: how often each was noted of those written.
    """

    shard: manifest.Shard
    files: Mapping[str, manifest.FileEntry]
    position: int
    rejects: Sequence[stream.Reject] = ()
    excluded: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Staging:
    """The folder of the version after `before`, with the commits that lie there.

    Attributes:
        folder: its name.
        commits: of finished shards, in order.
    """

    def __init__(self, root: Path, before: manifest.MemoryManifest, plan: Mapping[str, Any]):
        """Goes on where a writer with the same plan was killed, else begins.

        Args:
            root: the memory.
            before: the version that this one follows.
            plan: everything that the shards depend on, as JSON.
        """
        self.folder = manifest.folder_of(before.version + 1)
        self._root = root
        self.commits: list[Commit] = []
        if self._is_mine(plan):
            self.commits = list(self._read_commits())
            self._keep_only_commits()
        else:
            shutil.rmtree(root / self.folder, ignore_errors=True)
            (root / self.folder).mkdir()
            files.write_json(root / self.folder / BEGUN, plan)

    @property
    def position(self) -> int:
        """Where the source is read on."""
        return self.commits[-1].position if self.commits else 0

    def commit(self, commit: Commit) -> None:
        """Counts a shard as done; its files are on the disk already."""
        path = self._marker(len(self.commits))
        files.write_json(path, {**dataclasses.asdict(commit), "rejects": _rows(commit.rejects)})
        self.commits.append(commit)

    def files(self) -> dict[str, manifest.FileEntry]:
        """All files of the shards, and what says that they are done."""
        markers = [self._marker(number) for number in range(len(self.commits))]
        sealed = manifest.seal_all(self._root, [self._root / self.folder / BEGUN, *markers])
        for commit in self.commits:
            sealed |= commit.files
        return sealed

    def _marker(self, number: int) -> Path:
        return self._root / self.folder / f"commit-{number:05d}.json"

    def _is_mine(self, plan: Mapping[str, Any]) -> bool:
        try:
            return files.read_json(self._root / self.folder / BEGUN) == plan
        except UserError:  # Missing, or cut short: nothing in the folder counts.
            return False

    def _read_commits(self) -> Iterator[Commit]:
        number = 0
        while self._marker(number).exists():
            commit = _parse(files.read_json(self._marker(number)))
            if any(
                manifest.check_file(self._root, name, entry, deep=True)
                for name, entry in commit.files.items()
            ):
                return
            yield commit
            number += 1

    def _keep_only_commits(self) -> None:
        kept = {self._root / self.folder / BEGUN}
        kept |= {self._marker(number) for number in range(len(self.commits))}
        kept |= {self._root / name for commit in self.commits for name in commit.files}
        for path in (self._root / self.folder).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in kept:
                path.unlink()


def _rows(rejects: Sequence[stream.Reject]) -> list[list[str]]:
    return [[reject.name, reject.reason, reject.detail] for reject in rejects]


def _parse(fields: dict[str, Any]) -> Commit:
    return Commit(
        **{
            **fields,
            "shard": manifest.Shard(**fields["shard"]),
            "files": {name: manifest.FileEntry(**e) for name, e in fields["files"].items()},
            "rejects": [stream.Reject(*reject) for reject in fields["rejects"]],
        }
    )
