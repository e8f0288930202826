"""Rows of vectors in several files that are mapped into memory: read where they are needed, and only then."""

from collections.abc import Sequence

import numpy as np

from rag_mm.memory.index import live_rows


class MappedRows:
    """Vectors that lie one after the other in several arrays, such as memory-mapped files.

    What is resident does not depend on their number: pages that were read can be dropped again. An instance
    may be read by several threads.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        dim: int,
        stored: np.ndarray | None = None,
        dtype: type = np.float32,
    ):
        """Joins arrays without copying them.

        Args:
            parts: arrays, each [n, D].
            dim: D.
            stored: int64 [R], which of all their rows count, in order; None: all.
            dtype: of the rows that are read.
        """
        self._parts, self._stored, self._dtype = tuple(parts), stored, dtype
        self.dim = dim
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])])

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._stored is None else len(self._stored)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, D)."""
        return len(self), self.dim

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Some rows.

        Args:
            rows: int [...], -1 where there is none; or a slice.

        Returns:
            [..., D], zeros where there is none.
        """
        if isinstance(rows, slice):
            wanted: np.ndarray = np.arange(*rows.indices(len(self)))
        else:
            wanted = np.asarray(rows)
        flat = wanted.reshape(-1)
        found: np.ndarray = np.zeros((len(flat), self.dim), self._dtype)
        kept = np.flatnonzero(flat != live_rows.MISSING)
        at = flat[kept] if self._stored is None else self._stored[flat[kept]]
        order = np.argsort(at, kind="stable")  # A file is read once, from its beginning to its end.
        kept, at = kept[order], at[order]
        ends = np.searchsorted(at, self._starts)
        for number in np.flatnonzero(np.diff(ends)).tolist():
            inside = slice(ends[number], ends[number + 1])
            found[kept[inside]] = self._parts[number][at[inside] - self._starts[number]]
        return found.reshape(*wanted.shape, self.dim)
