"""Approximate search in host memory with ScaNN, behind the interface of every index."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_mm.core import files, progress
from rag_mm.core.errors import UserError
from rag_mm.memory.index import live_rows, own_indexes, protocol, scann_searcher
from rag_mm.memory.index.scann_config import ScannConfig

__all__ = ["ScannConfig", "ScannIndex"]


class ScannIndex:
    """ScaNN inner-product search, tuned by size; invalid inputs never reach the native code.

    Removed rows stay in ScaNN's data structures and are filtered out of its hits.
    """

    kind = "scann"

    def __init__(self, config: ScannConfig | None = None):
        """Raises UserError if ScaNN is not installed, before any rows are embedded."""
        scann_searcher.load_scann()
        self._config = config or ScannConfig()
        self._rows: np.ndarray | None = None
        self._live: live_rows.LiveRows | None = None
        self._searchers: list[scann_searcher.Searcher] = []
        self._starts: list[int] = []

    @property
    def num_rows(self) -> int:
        """Number of rows, excluding removed ones."""
        return 0 if self._live is None else len(self._live)

    def scoring(self) -> str:
        """The search method at the current size: `brute_force`, `hashed` or `tree`."""
        return self._config.split(0 if self._rows is None else len(self._rows))[0].scoring

    def build(self, embeddings: np.ndarray) -> None:
        """Replaces the rows; see `Index.build`."""
        rows = protocol.check_rows(embeddings)  # A NaN would abort the process in native code.
        config = self._set_rows(rows)
        self._searchers = []  # Frees the old searchers before new ones are built.
        for part in self._parts(rows):
            built = scann_searcher.Searcher.build(part, config.resolve(len(part)))
            self._searchers.append(built)

    def add(self, embeddings: np.ndarray) -> None:
        """Appends rows and rebuilds the index, so that recall does not depend on their order."""
        if self._rows is None or self._live is None:
            self.build(embeddings)
            return
        embeddings = protocol.check_rows(embeddings, self._rows.shape[1])
        self.build(np.concatenate([self._rows[self._live.stored], embeddings]))

    def remove(self, ids: np.ndarray) -> None:
        """Removes rows; see `Index.remove`."""
        self._live = protocol.require_rows(self._live).without(ids)

    def search(self, queries: np.ndarray, k: int) -> protocol.Neighbors:
        """The best k rows for each query; see `Index.search`."""
        dim = None if self._rows is None else self._rows.shape[1]
        queries = protocol.check_queries(queries, k, dim)
        live = self._live
        num_hits = min(k, self.num_rows)
        if live is None or num_hits == 0 or len(queries) == 0:
            empty = np.zeros((len(queries), 0), np.float32)
            return protocol.pad_hits(empty, empty, k)
        # Some hits are removed rows, so more than k are fetched, and more again for queries that need it.
        fetched = num_hits if not live.num_removed else min(2 * num_hits + 16, live.num_stored)
        ids, scores = self._search_live(live, queries, fetched, num_hits, all_leaves=False)
        while (incomplete := np.flatnonzero(ids[:, num_hits - 1] == protocol.MISSING)).size:
            fetched = min(4 * fetched, num_hits + live.num_removed)
            ids[incomplete], scores[incomplete] = self._search_live(
                live, queries[incomplete], fetched, num_hits, all_leaves=True
            )
            if fetched == num_hits + live.num_removed:
                break
        return protocol.pad_hits(ids, scores, k)

    def _search_live(
        self,
        live: live_rows.LiveRows,
        queries: np.ndarray,
        fetched: int,
        num_hits: int,
        all_leaves: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores [Q, num_hits] of the best live rows among `fetched` hits, missing ones last."""
        ids, scores = self._search_stored(queries, fetched, all_leaves)
        if not live.num_removed:
            return ids, scores
        ids = live.rows_at(ids)
        order = np.argsort(ids == protocol.MISSING, axis=1, kind="stable")[:, :num_hits]
        ids = np.take_along_axis(ids, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
        return ids, np.where(ids == protocol.MISSING, np.float32(-np.inf), scores)

    def _search_stored(
        self, queries: np.ndarray, k: int, all_leaves: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k stored rows of all searchers."""
        if len(self._searchers) == 1:
            return self._searchers[0].search(queries, k, all_leaves)
        hits = []
        ends = [*self._starts[1:], self.num_rows if self._rows is None else len(self._rows)]
        for start, end, searcher in zip(self._starts, ends, self._searchers, strict=True):
            ids, scores = searcher.search(queries, min(k, end - start), all_leaves)
            hits.append((np.where(ids == protocol.MISSING, ids, ids + np.int32(start)), scores))
        ids, scores = (np.concatenate(parts, axis=1) for parts in zip(*hits, strict=True))
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)

    def native(self) -> Callable[[np.ndarray, int], Any]:
        """ScaNN's searches without checks, for benchmarks: (queries, k) -> (ids, distances) by searcher."""
        return lambda queries, k: [searcher.native(queries, k) for searcher in self._searchers]

    def save(self, directory: Path) -> None:
        """Writes the index's files, after a rebuild if rows were removed; see `Index.save`."""
        if self._rows is not None and self._live is not None and self._live.num_removed:
            self.build(self._rows[self._live.stored])
        directory.mkdir(parents=True, exist_ok=True)
        parts = []
        if self.scoring() != "brute_force":
            for number, searcher in enumerate(self._searchers):
                folder = directory / _part(number, len(self._searchers))
                folder.mkdir(exist_ok=True)
                parts.append(searcher.save(folder))
        saved = {
            "kind": self.kind,
            "rows": self.num_rows,
            "dim": 0 if self._rows is None else self._rows.shape[1],
            "config": dataclasses.asdict(self._config),
            "files": parts,
        }
        files.write_json(directory / "index.json", saved)
        own_indexes.record(directory / "index.json")

    def load(self, directory: Path, embeddings: np.ndarray) -> None:
        """Reads what `save` wrote; see `Index.load`.

        An index that this user did not save (`own_indexes`) is built from its rows, with default settings.
        """
        path = directory / "index.json"
        saved = files.read_object(path)
        if saved.get("kind") != self.kind or saved.get("rows") != len(embeddings):
            raise _damaged(path, embeddings)
        if not own_indexes.is_own(path):
            self._config = ScannConfig()
            if saved.get("files"):
                progress.say(
                    f"{directory} was built by somebody else or elsewhere, so it is built again from its "
                    "rows, now and each time; memory compact writes a version with one of your own."
                )
            self.build(embeddings)
            return
        try:
            digests = [dict(part) for part in _as_parts(saved["files"])]
            self._config, dim = ScannConfig(**saved["config"]), saved["dim"]
        except (TypeError, KeyError, ValueError):
            raise _damaged(path, embeddings) from None
        if not digests:
            self.build(embeddings)
            return
        if embeddings.shape[1:] != (dim,):
            raise _damaged(path, embeddings)
        checked = protocol.check_rows(embeddings)
        config = self._set_rows(checked)
        if len(digests) != len(self._starts):
            raise UserError(
                f"{path} lists {len(digests)} searchers instead of {len(self._starts)}: "
                "the memory is damaged; build it again."
            )
        self._searchers = [
            scann_searcher.Searcher.load(
                directory / _part(number, len(digests)), part, len(rows), config.resolve(len(rows))
            )
            for number, (part, rows) in enumerate(zip(digests, self._parts(checked), strict=True))
        ]

    def _set_rows(self, rows: np.ndarray) -> ScannConfig:
        """Sets the rows; returns the settings of their searchers."""
        self._rows, self._live = rows, live_rows.LiveRows(len(rows))
        config, self._starts = self._config.split(len(rows))
        return config

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """Splits the rows into equal parts, one per searcher."""
        return np.split(rows, self._starts[1:]) if len(rows) else []


def _damaged(path: Path, embeddings: np.ndarray) -> UserError:
    return UserError(
        f"{path} does not describe a scann index over {len(embeddings)} rows of this width: "
        "the memory is damaged; build it again."
    )


def _part(number: int, num_parts: int) -> str:
    """The folder of a searcher, relative to that of the index."""
    return "." if num_parts == 1 else f"part-{number:05d}"


def _as_parts(saved: Any) -> Sequence[Mapping[str, str]]:
    """Digests by searcher; an older index has one searcher, whose digests are stored without a list."""
    if isinstance(saved, dict):
        return [saved] if saved else []
    return saved
