"""Endless batches of packed training sequences from a mixture of corpora, resumed exactly.

Batch b is the same for any number of processes and workers. They plan alike (`packing_plan`); each reads and
lays out its own rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.corpus import packing_plan
from rag_mm.corpus.neighbor_rows import MISSING
from rag_mm.corpus.packing_plan import MixturePart, RowsConfig, WindowPlan
from rag_mm.data import flat_documents, packing, pipeline
from rag_mm.data.flat_documents import FlatDocuments
from rag_mm.data.joint_layout import Generators


class Draw(Protocol):
    """Lays out many sequences."""

    def __call__(
        self, documents: FlatDocuments, num_docs: np.ndarray, generators: Generators
    ) -> tuple[packing.Row, np.ndarray]:
        """Makes sequences of documents, each by itself alike in any company.

        Args:
            documents: of N sequences, in order: the neighbors of each, in random order, and its main one.
            num_docs: how many neighbors each sequence has, int [N].
            generators: each sequence's own, of what is random in it.

        Returns:
            Arrays [T] of all sequences one after another, among them `segment_ids` of ones; and the tokens of
            each sequence, int [N], at most 1, the ids of its segments and one each, and `reserve`.
        """
        ...


PREFETCHED = 4  # Batches made ahead.


def make_batches(
    parts: Sequence[MixturePart],
    config: RowsConfig,
    batch_size: int,
    draw: Draw,
    *,
    padding: dict[str, int],
    rows: range | None = None,
    num_workers: int = 0,
) -> grain.DatasetIterator[packing.Row]:
    """Shuffles, mixes and packs the documents of corpora, without end.

    Every epoch of a corpus has its own order over all its documents. Config and b alone determine batch b.

    Args:
        parts: the corpora.
        config: rows and random choices.
        batch_size: rows per batch.
        draw: lays out sequences, for example with masked spans.
        padding: the value that fills the end of a row, by name of an array; 0 elsewhere.
        rows: which rows of each batch to make, if other processes make the rest; None makes all. The
            iterator's state does not depend on it.
        num_workers: processes that read and lay out, each its share of the batches; 0 uses a thread.

    Returns:
        An iterator over arrays [batch_size, length] by name; `segment_ids` number the sequences of a row from
        1, and `pipeline.RECORDS` has the document of each token, by its number in all corpora joined, -1 in
        padding. `get_state()` returns a JSON value that `set_state` accepts on an iterator made with the same
        arguments.

    Raises:
        UserError: as of `packing_plan.RowPlanner`.
    """
    batches = make_dataset(parts, config, batch_size, draw, padding=padding, rows=rows)
    if num_workers:
        return iter(pipeline.in_processes(batches, num_workers))
    ahead = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCHED)
    return iter(ahead)


def make_dataset(
    parts: Sequence[MixturePart],
    config: RowsConfig,
    batch_size: int,
    draw: Draw,
    *,
    padding: dict[str, int],
    rows: range | None = None,
) -> "PackedBatches":
    """The dataset behind `make_batches`, which makes a batch when it is asked for."""
    planner = packing_plan.RowPlanner(parts, config)
    maker = _RowMaker(planner, draw, {pipeline.RECORDS: -1, **padding})
    return PackedBatches(maker, batch_size, rows or range(batch_size))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _RowMaker:
    """Reads the documents of planned rows and lays them out."""

    planner: packing_plan.RowPlanner
    draw: Draw
    padding: dict[str, int]

    def make(self, planned: Sequence[tuple[WindowPlan, int]]) -> packing.Row:
        """The arrays [R, length] of some rows, each a window's plan and the row's number in it."""
        chosen = [(plan, plan.rows[row]) for plan, row in planned]
        part, ordinal, document = (
            np.concatenate([getattr(plan, name)[rows] for plan, rows in chosen])
            for name in ("part", "ordinal", "document")
        )
        neighbors = np.concatenate([plan.neighbors[rows] for plan, rows in chosen])
        documents = self._read(part, document, neighbors)
        num_docs = (neighbors >= 0).sum(axis=1)
        flat, lengths = self.draw(documents, num_docs, self._generators(part, ordinal))
        before = np.cumsum([0, *(len(each.corpus) for each in self.planner.parts)])
        flat[pipeline.RECORDS] = np.repeat(before[part] + document, lengths)
        counts = [len(rows) for _, rows in chosen]
        return packing.join_flat(flat, lengths, counts, self.planner.config.length, self.padding)

    def _generators(self, part: np.ndarray, ordinal: np.ndarray) -> Generators:
        """Philox with a key of its own for each sequence; setting its state is faster than making one."""
        generator = np.random.Generator(np.random.Philox(key=0))
        state = generator.bit_generator.state
        first = self.planner.config.seed << 16
        keys = list(zip((first | part).tolist(), ordinal.tolist(), strict=True))

        def of(number: int) -> np.random.Generator:
            state["state"]["key"][:] = keys[number]
            generator.bit_generator.state = state
            return generator

        return of

    def _read(self, part: np.ndarray, document: np.ndarray, neighbors: np.ndarray) -> FlatDocuments:
        """The documents of all sequences, neighbors first; each corpus is read once."""
        place = np.full((len(part), neighbors.shape[1] + 1), MISSING, np.int64)
        read, count = [], 0
        for number, source in enumerate(self.planner.parts):
            at = np.flatnonzero(part == number)
            read.append(source.corpus.read_flat(document[at]))
            place[at, -1] = count + np.arange(len(at))
            count += len(at)
            if source.neighbors is None:
                continue
            sequence, column = np.nonzero(neighbors[at] >= 0)
            wanted = neighbors[at[sequence], column]
            read.append(source.neighbors.documents.read_flat(wanted))
            place[at[sequence], column] = count + np.arange(len(wanted))
            count += len(wanted)
        documents = flat_documents.join(read).cut(self.planner.config.max_text_len)
        return documents.take(place[place >= 0])


class PackedBatches(grain.IterDataset):
    """The batches from `first` on, every `step`-th, which is what a worker makes."""

    def __init__(self, maker: _RowMaker, batch_size: int, rows: range):
        super().__init__()
        self.maker, self.batch_size, self.rows = maker, batch_size, rows
        self.first, self.step = 0, 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by Grain in a worker."""
        self.first, self.step = sl.start or 0, sl.step or 1

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
    """Its state is the window, the number of its rows that are used, and the examples before it by part."""

    def __init__(self, dataset: PackedBatches):
        super().__init__()
        self._dataset = dataset
        self._window, self._row = 0, 0
        self._counts: tuple[int, ...] = (0,) * len(dataset.maker.planner.parts)
        self._plan: tuple[WindowPlan, tuple[int, ...]] | None = None
        self._skipped = dataset.first  # Batches of other workers, before the next one here.

    def __next__(self) -> packing.Row:
        size = self._dataset.batch_size
        for _ in self._next_rows(self._skipped * size):
            pass
        planned = list(self._next_rows(size))
        self._skipped = self._dataset.step - 1
        return self._dataset.maker.make([planned[i] for i in self._dataset.rows])

    def get_state(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "window": self._window,
            "row": self._row,
            "counts": list(self._counts),
            "skipped": self._skipped,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called.

        Raises:
            UserError: the state is of a mixture of another number of corpora.
        """
        if len(state["counts"]) != len(self._counts):
            raise UserError(
                f"The checkpoint mixes {len(state['counts'])} corpora, not {len(self._counts)}; resume with "
                "the same corpora."
            )
        self._window, self._row = state["window"], state["row"]
        self._counts, self._skipped = tuple(state["counts"]), state["skipped"]
        self._plan = None

    def _next_rows(self, count: int) -> Iterator[tuple[WindowPlan, int]]:
        for _ in range(count):
            if self._plan is None:
                planner = self._dataset.maker.planner
                self._plan = planner.plan(self._window, self._counts)
            plan, after = self._plan
            yield plan, self._row
            self._row += 1
            if self._row == len(plan.rows):
                self._window, self._row, self._counts, self._plan = self._window + 1, 0, after, None
