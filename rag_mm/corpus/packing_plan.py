"""Which documents a row of training tokens holds: decided by lengths alone, alike in every process.

A window of examples is drawn and packed into rows, the longest first, each into the fullest row with room.
Only the process that needs a row then reads its documents.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.core import checks
from rag_mm.core.errors import UserError
from rag_mm.corpus import shuffled_order
from rag_mm.corpus.corpus_reader import TokenCorpus
from rag_mm.corpus.neighbor_rows import MISSING, NeighborRows


@dataclasses.dataclass(frozen=True, eq=False)
class MixturePart:
    """A corpus in a mixture.

    Attributes:
        corpus: its documents.
        weight: how often one of its documents is drawn, relative to the other parts.
        neighbors: documents that may stand before each; None: none do.
        left_out: numbers of documents that are never drawn, int [M], such as held-out ones; None: none are.
        unread: numbers of the neighbors' documents that never stand before another, int [M].
    """

    corpus: TokenCorpus
    weight: float = 1.0
    neighbors: NeighborRows | None = None
    left_out: np.ndarray | None = None
    unread: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """Rows of tokens.

    Attributes:
        length: tokens in a row.
        seed: at least 0.
        max_text_len: texts are cut to this many ids.
        num_docs_weights: relative frequencies of sequences with 0, 1, .. neighbors.
        reserve: tokens kept free in every sequence, such as three for each masked span.
        window: examples packed together. The more there are, the fuller the rows.
    """

    length: int
    seed: int = 0
    max_text_len: int = 1024
    num_docs_weights: tuple[float, ...] = (1.0,)
    reserve: int = 0
    window: int = 1024

    def __post_init__(self):
        checks.at_least(self, 0, "seed", "reserve")
        checks.at_least(self, 1, "length", "max_text_len", "window")
        if min(self.num_docs_weights) < 0 or not 0 < sum(self.num_docs_weights) < math.inf:
            raise UserError(
                f"num_docs_weights are {self.num_docs_weights}; give at least 0, not all 0."
            )


class WindowPlan(NamedTuple):
    """The examples of a window and the rows that hold them.

    Attributes:
        part: int [W], part of the mixture.
        ordinal: int64 [W], the example's number in its part's stream; it seeds what is drawn for it.
        document: int64 [W], number in the part's corpus.
        neighbors: int32 [W, K], numbers in the part's neighbor documents, in random order; -1 for none.
        rows: the examples of each row.
    """

    part: np.ndarray
    ordinal: np.ndarray
    document: np.ndarray
    neighbors: np.ndarray
    rows: list[list[int]]


class RowPlanner:
    """Plans windows of a mixture."""

    def __init__(self, parts: Sequence[MixturePart], config: RowsConfig):
        """Reads the lengths of all documents.

        Raises:
            UserError: a weight is not a positive number, corpora of different tokenizers, neighbors of
                another corpus, or no document fits a row.
        """
        check_mixture(parts)
        self.parts, self.config = tuple(parts), config
        weights = np.array([part.weight for part in parts])
        self._shares = weights / weights.sum()
        self._lengths = [part.corpus.lengths(config.max_text_len) for part in parts]
        self._usable = [self._fitting(i) for i in range(len(parts))]
        docs = np.array(config.num_docs_weights, float)
        self._num_docs = np.cumsum(docs / docs.sum())

    @property
    def num_too_long(self) -> int:
        """Number of documents that fit no row, or are left out for other reasons."""
        return sum(len(a) - len(b) for a, b in zip(self._lengths, self._usable, strict=True))

    def plan(self, window: int, counts: Sequence[int]) -> tuple[WindowPlan, tuple[int, ...]]:
        """Plans a window.

        Args:
            window: its number.
            counts: how many examples of each part the windows before it hold.

        Returns:
            The plan, and the counts after it.
        """
        config = self.config
        rng = np.random.default_rng((config.seed, 1, window))
        part = rng.choice(len(self.parts), config.window, p=self._shares)
        uniform = rng.random(config.window)
        ordinal, document = np.zeros((2, config.window), np.int64)
        max_docs = len(self._num_docs) - 1
        neighbors = np.full((config.window, max_docs), MISSING, np.int32)
        length = np.zeros(config.window, np.int64)
        after = list(counts)
        for i in range(len(self.parts)):
            at = np.flatnonzero(part == i)
            ordinal[at] = counts[i] + np.arange(len(at))
            after[i] += len(at)
            document[at] = self._documents(i, ordinal[at])
            wanted = np.searchsorted(self._num_docs, uniform[at], side="right")
            neighbors[at], length[at] = self._with_neighbors(i, document[at], wanted, rng)
        rows = fill_rows(length, config.length)
        order = np.random.default_rng((config.seed, 2, window)).permutation(len(rows))
        rows = [rows[i] for i in order]
        return WindowPlan(part, ordinal, document, neighbors, rows), tuple(after)

    def _fitting(self, i: int) -> np.ndarray:
        room = self.config.length - self.config.reserve - 1
        is_usable = self._lengths[i] <= room
        if self.parts[i].left_out is not None:
            is_usable[self.parts[i].left_out] = False
        usable = np.flatnonzero(is_usable).astype(np.int32)
        if not len(usable):
            raise UserError(
                f"No document of {self.parts[i].corpus.path} fits a row of {self.config.length} tokens; give "
                "longer rows or a smaller max_text_len."
            )
        return usable

    def _documents(self, i: int, ordinals: np.ndarray) -> np.ndarray:
        """The documents at places of a part's endless stream, another order in each epoch: int64 [N]."""
        size = len(self._usable[i])
        epochs, places = np.divmod(ordinals, size)
        documents = np.zeros(len(ordinals), np.int64)
        for epoch in np.unique(epochs).tolist():
            at = epochs == epoch
            order = shuffled_order.permute(places[at], size, self.config.seed, i, epoch)
            documents[at] = self._usable[i][order]
        return documents

    def _with_neighbors(
        self, i: int, documents: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Neighbors int32 [N, K], at most `wanted` of each document and as fit a row; lengths [N]."""
        found, max_docs = self.parts[i].neighbors, len(self._num_docs) - 1
        length = 1 + self._lengths[i][documents].astype(np.int64) + self.config.reserve
        chosen = np.full((len(documents), max_docs), MISSING, np.int32)
        if found is None or not max_docs or not len(documents):
            return chosen, length
        by_query = found.take(documents)
        unread = self.parts[i].unread
        if unread is not None and len(unread):
            by_query[np.isin(by_query, unread)] = MISSING
        # A query is the text or the image; of a document without one, the other.
        query = rng.integers(by_query.shape[1], size=len(documents))
        has_any = np.asarray((by_query >= 0).any(axis=2))
        query = np.where(has_any[np.arange(len(query)), query], query, 1 - query)
        ids = by_query[np.arange(len(query)), query]
        # In a random order, missing ones last.
        order = np.argsort(rng.random(ids.shape) + (ids < 0), axis=1)
        ids = np.take_along_axis(ids, order, axis=1)[:, :max_docs]
        chosen[:, : ids.shape[1]] = ids
        chosen[np.arange(max_docs) >= wanted[:, None]] = MISSING
        sizes = np.where(chosen >= 0, found.lengths(self.config.max_text_len)[chosen], 0)
        # The last ones are dropped where a sequence would be longer than a row.
        chosen[length[:, None] + np.cumsum(sizes, axis=1) > self.config.length] = MISSING
        return chosen, length + np.where(chosen >= 0, sizes, 0).sum(axis=1)


def check_mixture(parts: Sequence[MixturePart]) -> None:
    """Checks that corpora can be mixed.

    Raises:
        UserError: there are none, a weight is not a positive number, or tokenizers differ.
    """
    if not parts:
        raise UserError("A mixture needs at least one corpus.")
    for part in parts:
        if not 0 < part.weight < math.inf:
            raise UserError(
                f"The weight of {part.corpus.path} is {part.weight}; give a positive number, or leave the "
                "corpus out."
            )
        part.corpus.check_tokenizer(parts[0].corpus.manifest.tokenizer)
        if part.neighbors is not None:
            part.neighbors.check_corpus(part.corpus)


def fill_rows(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Packs examples of `lengths` tokens, int [W], into rows of `room`: best fit, the longest first.

    Raises:
        ValueError: an example is longer than a row.
    """
    if len(lengths) and lengths.max() > room:
        raise ValueError(f"an example of {lengths.max()} tokens is longer than a row of {room}")
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            rows.append([])
            free.append((room, len(rows) - 1))
        left, row = free.pop(at)
        rows[row].append(example)
        bisect.insort(free, (left - length, row))
    return rows
