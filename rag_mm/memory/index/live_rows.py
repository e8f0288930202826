"""Row numbering after removals: maps stored positions to the rows that remain."""

import numpy as np

from rag_mm.core.errors import UserError

MISSING = -1
"""The row number that stands for no row."""


class LiveRows:
    """The stored rows that were not removed; a row is a position among these.

    Removing a row moves no data. As in a list, it lowers the numbers of all later rows by one.

    Attributes:
        num_stored: number of stored rows, including removed ones.
        mask: bool [num_stored], False for removed rows.
        stored: int64 [R], the stored positions of the live rows, ascending.
    """

    def __init__(self, num_stored: int, removed: np.ndarray | None = None):
        """Stored rows 0 .. num_stored - 1 without those at the positions `removed`, int [M]."""
        self.num_stored = num_stored
        self.mask = np.ones(num_stored, bool)
        if removed is not None:
            self.mask[removed] = False
        self.stored = np.flatnonzero(self.mask)
        # The last entry maps position MISSING = -1 to MISSING.
        self._rows = np.append(np.cumsum(self.mask) - 1, MISSING).astype(np.int32)
        self._rows[:-1][~self.mask] = MISSING

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def num_removed(self) -> int:
        """Number of removed rows."""
        return self.num_stored - len(self.stored)

    @property
    def removed(self) -> np.ndarray:
        """Stored positions of the removed rows, int64 [M], ascending."""
        return np.flatnonzero(~self.mask)

    def without(self, rows: np.ndarray) -> "LiveRows":
        """A copy without the given live rows, int [M].

        Raises:
            UserError: a row is out of range.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size:
            raise UserError(f"Row {outside[0]} cannot be removed: there are {len(self)} rows.")
        return LiveRows(self.num_stored, np.concatenate([self.removed, self.stored[rows]]))

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows, int32, at stored positions of any shape; -1 for a removed or missing one."""
        return self._rows[positions]
