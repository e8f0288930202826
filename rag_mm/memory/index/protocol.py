"""The interface of every index over embeddings, and the argument checks they share."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.memory.index import live_rows

MISSING = live_rows.MISSING
"""The id of a missing hit; its score is minus infinity."""

MAX_HITS = 1_000_000
"""More hits per query are refused: the answer has room for k, even where there are fewer rows."""

# Rows are checked in blocks: a mask of all values at once would take a quarter of the rows' memory.
_ROWS_PER_CHECK = 16_384
_LARGEST = 1e6  # Rows have unit length; products of larger ones overflow native code.


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbors:
    """The best rows of each query, best first: `ids` int32 [Q, k] and `scores` float32 [Q, k].

    Where fewer than k rows qualify, the id is -1 and the score is -inf.
    """

    ids: np.ndarray
    scores: np.ndarray


class Index(Protocol):
    """Inner-product search over rows; the id of a row is its position among the given rows.

    An index can always be rebuilt from its rows. The memory stores the rows once and passes them to `load`.
    Methods that change the index are not safe while another thread searches it.
    """

    kind: str

    @property
    def num_rows(self) -> int:
        """Number of rows, excluding removed ones."""
        ...

    def build(self, embeddings: np.ndarray) -> None:
        """Replaces the rows with float32 [R, D].

        Raises:
            UserError: the rows have the wrong shape, or hold NaN or infinity.
        """
        ...

    def add(self, embeddings: np.ndarray) -> None:
        """Appends rows, float32 [M, D]; they get the next M ids.

        Raises:
            UserError: as `build`, or D differs from that of the existing rows.
        """
        ...

    def remove(self, ids: np.ndarray) -> None:
        """Removes rows, int [M]; as in a list, the ids of later rows shift down.

        Raises:
            UserError: an id is out of range, or the index was never built.
        """
        ...

    def search(self, queries: np.ndarray, k: int) -> Neighbors:
        """The k rows with the largest inner product for each of float32 [Q, D], best first.

        Raises:
            UserError: k < 1, a wrong width, NaN or infinity, or the index was never built.
        """
        ...

    def save(self, directory: Path) -> None:
        """Writes what `load` needs, except the rows, into a folder that it creates; drops removed rows."""
        ...

    def load(self, directory: Path, embeddings: np.ndarray) -> None:
        """Reads what `save` wrote; `embeddings` are the rows that remained at that time.

        Raises:
            UserError: a file is missing, unknown or damaged, or belongs to other rows.
        """
        ...


def check_rows(embeddings: np.ndarray, dim: int | None = None) -> np.ndarray:
    """Returns rows as contiguous, finite float32 [R, D]; R may be 0.

    Raises:
        UserError: the array is not two-dimensional, D is 0 or not `dim`, or a row holds NaN, infinity or
            more than 1e6.
    """
    return _check(embeddings, dim, "Embeddings", "Row")


def check_queries(queries: np.ndarray, k: int, dim: int | None) -> np.ndarray:
    """Returns queries as contiguous, finite float32 [Q, D]; Q may be 0.

    Args:
        queries: the queries.
        k: number of hits per query.
        dim: width of the index's rows, or None if it was never built.

    Raises:
        UserError: the index was never built, k is not 1 to `MAX_HITS`, a wrong width, or NaN or infinity.
    """
    if dim is None:
        raise UserError("The index has no rows yet: build or load it before a search.")
    if not 1 <= k <= MAX_HITS:
        raise UserError(f"A search for k = {k} is not possible; give k from 1 to {MAX_HITS:,}.")
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
            f"{one} {bad[0]} holds NaN, infinity or more than {_LARGEST:g} ({bad.size} of {len(values)} do): "
            "the encoder's output is broken."
        )
    return values


def _bad_rows(values: np.ndarray) -> np.ndarray:
    """Positions of rows that hold NaN, infinity or values whose products might not be finite."""
    bad = []
    for start in range(0, len(values), _ROWS_PER_CHECK):
        block = values[start : start + _ROWS_PER_CHECK]
        # NaN is outside of any bounds. Both reductions need no copy of the block.
        is_good = (block.max(axis=1) <= _LARGEST) & (block.min(axis=1) >= -_LARGEST)
        bad.append(start + np.flatnonzero(~is_good))
    return np.concatenate([np.zeros(0, np.int64), *bad])


def require_rows(live: live_rows.LiveRows | None) -> live_rows.LiveRows:
    """The live rows; raises UserError if the index was never built."""
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
    """Searches in batches of queries.

    Args:
        search_batch: (queries [q, D], num_hits) -> stored positions int32 and scores float32
            [q, num_hits].
        live: the live rows; None if the index was never built.
        queries: [Q, D], checked.
        k: hits per query; those beyond the number of rows are missing.
        batch_size: maximum number of queries per batch.
    """
    num_hits = 0 if live is None else min(k, len(live))
    if live is None or num_hits == 0 or len(queries) == 0:
        empty = np.zeros((len(queries), 0), np.float32)
        return pad_hits(empty, empty, k)
    batches = [
        search_batch(queries[start : start + batch_size], num_hits)
        for start in range(0, len(queries), batch_size)
    ]
    positions, scores = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return pad_hits(live.rows_at(positions), scores, k)


def pad_hits(ids: np.ndarray, scores: np.ndarray, k: int) -> Neighbors:
    """Pads hits [Q, n], n <= k, to k columns with missing hits."""
    padding = ((0, 0), (0, k - ids.shape[1]))
    return Neighbors(
        np.pad(ids.astype(np.int32), padding, constant_values=MISSING),
        np.pad(scores.astype(np.float32), padding, constant_values=-np.inf),
    )
