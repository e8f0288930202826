"""What every index over embeddings promises, and the checks at its boundary (design.md section 7)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.memory.index import live_rows

MISSING = live_rows.MISSING
"""The id of a hit that does not exist; its score is minus infinity."""


_ROWS_PER_CHECK = (
    16_384  # What is noted of each value of all rows would be a quarter of their size.
)


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbors:
    """The best rows of each query, best first: `ids` int32 [Q, k] and `scores` float32 [Q, k].

    Where fewer than k rows qualify, the id is -1 and the score is -inf.
    """

    ids: np.ndarray
    scores: np.ndarray


class Index(Protocol):
    """Inner-product search over rows; the id of a row is its place among the rows given.

    An index holds nothing that cannot be made again from its rows, and so `load` is handed them:
    the memory keeps them, once. A method that changes the index is not safe beside a search in
    another thread: change one, then hand it over.
    """

    kind: str

    @property
    def num_rows(self) -> int:
        """How many rows can be found."""
        ...

    def build(self, embeddings: np.ndarray) -> None:
        """Replaces the rows by float32 [R, D].

        Raises:
            UserError: the rows have the wrong shape, or NaN or infinity.
        """
        ...

    def add(self, embeddings: np.ndarray) -> None:
        """Appends rows, float32 [M, D]; they get the ids after the last.

        Raises:
            UserError: as `build`, or D differs from that of the rows before.
        """
        ...

    def remove(self, ids: np.ndarray) -> None:
        """Takes rows out, int [M]; as in a list, the ids of those after them close up.

        Raises:
            UserError: an id is no row's, or the index was never built.
        """
        ...

    def search(self, queries: np.ndarray, k: int) -> Neighbors:
        """The k rows with the largest inner product for each of float32 [Q, D], best first.

        Raises:
            UserError: k < 1, a wrong width, NaN or infinity, or an index never built.
        """
        ...

    def save(self, directory: Path) -> None:
        """Writes what `load` needs beside the rows that are left into a folder that it makes."""
        ...

    def load(self, directory: Path, embeddings: np.ndarray) -> None:
        """Reads what `save` wrote over the same rows.

        Raises:
            UserError: a file is missing, unknown or damaged, or belongs to other rows.
        """
        ...


def check_rows(embeddings: np.ndarray, dim: int | None = None) -> np.ndarray:
    """Rows as a contiguous float32 [R, D], all finite; R may be 0.

    Raises:
        UserError: not two axes, D is 0 or not `dim`, or a row holds NaN or infinity.
    """
    return _check(embeddings, dim, "Embeddings", "Row")


def check_queries(queries: np.ndarray, k: int, dim: int | None) -> np.ndarray:
    """Queries as a contiguous float32 [Q, D], all finite; Q may be 0.

    Args:
        queries: the queries.
        k: how many hits are wanted.
        dim: the width of the index's rows, or None where it was never built.

    Raises:
        UserError: the index was never built, k < 1, a wrong width, or NaN or infinity.
    """
    if dim is None:
        raise UserError("The index has no rows yet: build or load it before a search.")
    if k < 1:
        raise UserError(f"A search for k = {k} finds nothing; ask for at least 1 neighbor.")
    return _check(queries, dim, "Queries", "Query")


def _check(values: np.ndarray, dim: int | None, what: str, one: str) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] == 0:
        raise UserError(f"{what} must be [rows, width], not of shape {list(values.shape)}.")
    if dim is not None and values.shape[1] != dim:
        raise UserError(
            f"{what} are {values.shape[1]} wide but the index is {dim} wide: "
            "use the retriever that the index was built with."
        )
    bad = _bad_rows(values)
    if bad.size:
        raise UserError(
            f"{one} {bad[0]} holds NaN or infinity ({bad.size} of {len(values)} do): "
            "the encoder that made them is broken."
        )
    return values


def _bad_rows(values: np.ndarray) -> np.ndarray:
    """Places of rows that hold NaN or infinity."""
    pieces = range(0, len(values), _ROWS_PER_CHECK)
    found = [
        start + np.flatnonzero(~np.isfinite(values[start : start + _ROWS_PER_CHECK]).all(axis=1))
        for start in pieces
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])


def need_rows(live: live_rows.LiveRows | None) -> live_rows.LiveRows:
    """The rows; raises UserError where an index was never built."""
    if live is None:
        raise UserError("The index has no rows yet: build or load it before a removal.")
    return live


def search_batches(
    search_batch: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    live: live_rows.LiveRows | None,
    queries: np.ndarray,
    k: int,
    batch_size: int,
) -> Neighbors:
    """Searches so many queries at a time.

    Args:
        search_batch: (queries [q, D], hits wanted) -> stored ids int32 and scores float32 [q, hits].
        live: the rows that are left; None before anything was built.
        queries: [Q, D], checked.
        k: neighbors to give; what there is not is missing.
        batch_size: most queries at once.
    """
    num_hits = 0 if live is None else min(k, len(live))
    if live is None or num_hits == 0 or len(queries) == 0:
        empty = np.zeros((len(queries), 0), np.float32)
        return pad_hits(empty, empty, k)
    found = [
        search_batch(queries[start : start + batch_size], num_hits)
        for start in range(0, len(queries), batch_size)
    ]
    ids, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return pad_hits(live.numbers(ids), scores, k)


def pad_hits(ids: np.ndarray, scores: np.ndarray, k: int) -> Neighbors:
    """Widens hits [Q, n], n <= k, to k columns with missing ones."""
    room = ((0, 0), (0, k - ids.shape[1]))
    return Neighbors(
        np.pad(ids.astype(np.int32), room, constant_values=MISSING),
        np.pad(scores.astype(np.float32), room, constant_values=-np.inf),
    )
