"""Which stored rows are left after removals, and the number that each of them then has."""

import numpy as np

from rag_mm.core.errors import UserError

MISSING = -1
"""The number of a row that does not exist."""


class LiveRows:
    """Stored rows without the removed ones: a row's number is its place among those left.

    Nothing moves when a row is removed; the numbers of later rows close up, as in a list.

    Attributes:
        num_stored: rows that lie there, removed ones included.
        stored: int64 [R], the places of the rows that are left, rising.
    """

    def __init__(self, num_stored: int, removed: np.ndarray | None = None):
        """Rows 0 .. num_stored - 1 without those at the places `removed`, int [M]."""
        self.num_stored = num_stored
        self.mask = np.ones(num_stored, bool)
        if removed is not None:
            self.mask[removed] = False
        self.stored = np.flatnonzero(self.mask)
        self._numbers = np.append(np.cumsum(self.mask) - 1, MISSING).astype(np.int32)
        self._numbers[:-1][~self.mask] = MISSING

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def num_removed(self) -> int:
        """How many stored rows are no longer there."""
        return self.num_stored - len(self.stored)

    @property
    def removed(self) -> np.ndarray:
        """Places of the removed rows, int64 [M], rising."""
        return np.flatnonzero(~self.mask)

    def without(self, rows: np.ndarray) -> "LiveRows":
        """The rows that are left when those with these numbers go too.

        Raises:
            UserError: a number is no row's.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size:
            raise UserError(f"Row {outside[0]} cannot be removed: there are {len(self)} rows.")
        return LiveRows(self.num_stored, np.concatenate([self.removed, self.stored[rows]]))

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """Numbers, int32, of stored places of any shape; -1 for a removed or missing one."""
        return self._numbers[places]
