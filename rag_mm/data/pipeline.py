"""Deterministic training batches with Grain: each example depends only on (seed, index); resumable."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import grain
import numpy as np
from absl import flags

from rag_mm.core.errors import UserError

T = TypeVar("T", covariant=True)

# Key of a batch that holds the indices of its source records, int64 [B].
RECORDS = "records"
# One thread next to the training step: more would only wait for Python's global lock.
READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class RecordSource(Protocol[T]):
    """Records with thread-safe random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T: ...


Transform = Callable[[T, np.random.Generator], dict[str, Any]]


def make_batches(
    source: RecordSource[T],
    batch_size: int,
    seed: int,
    *transforms: Transform,
    shares: Sequence[float] = (1.0,),
    num_workers: int = 0,
    rows: range | None = None,
    whole_epochs: bool = False,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Shuffles, transforms and batches records, without end.

    Every epoch has its own order. `seed` and i alone determine example i of the whole run: its record and
    the generator passed to the transform. Batches therefore do not depend on threads, workers or
    interruptions. A batch may span two epochs, and then hold a record twice, unless `whole_epochs`.

    Args:
        source: the records.
        batch_size: examples per batch.
        seed: at least 0.
        transforms: each turns one record into arrays (or numbers) of fixed shapes. They run in a separate
            thread or, with workers, are pickled and sent to them. With several transforms, each batch
            uses a single one, since only equal shapes can be stacked, and each shuffles the records
            independently.
        shares: relative frequency of the batches of each transform, evenly interleaved.
        num_workers: processes that read and transform; 0 uses a thread of this process.
        rows: which examples of each batch to make, if other processes make the rest
            (`sharding.local_rows`); None makes all. The iterator's state does not depend on it.
        whole_epochs: batches do not span epochs, so none holds a record twice; the records that do not fill
            an epoch's last batch, other ones in every epoch, are left out. For losses that compare the
            examples of a batch with each other.

    Returns:
        An iterator over dicts of arrays [batch_size, ...], including `RECORDS`. `get_state()` returns a JSON
        value that `set_state` accepts on an iterator made with the same arguments.

    Raises:
        UserError: the records do not fill a single batch.
        ValueError: the numbers of transforms and shares differ.
    """
    _check_filled(len(source), batch_size, whole_epochs)
    seeds = np.random.SeedSequence(seed).spawn(len(transforms))
    maker = _BatchMaker(source, batch_size, rows or range(batch_size), whole_epochs)
    mixture = [
        (maker.make(transform, transform_seed), float(share))
        for transform, share, transform_seed in zip(transforms, shares, seeds, strict=True)
        if share > 0
    ]
    dataset = grain.MapDataset.mix(*zip(*mixture, strict=True))
    return iter(in_processes(dataset.to_iter_dataset(READING), num_workers))


def make_array_batches(
    num_records: int,
    batch_size: int,
    seed: int,
    take: Callable[[np.ndarray], dict[str, np.ndarray]],
    rows: range | None = None,
    draw: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Shuffles and batches records that lie in arrays, without end, with one call per batch.

    For records so small that `make_batches`, which takes tens of microseconds for each, would be slower than
    the training step. Every epoch has its own order, and its batches hold no record twice; the records that
    do not fill its last batch, other ones in every epoch, are left out. `seed` and i alone determine batch i.

    Args:
        num_records: records are numbered from 0.
        batch_size: examples per batch.
        seed: at least 0.
        take: record numbers, int64 [B] -> arrays [B, ...]. It runs in a separate thread.
        rows: as for `make_batches`.
        draw: (epoch, positions int64 [B]) -> record numbers, int64 [B], a permutation in every epoch. None
            keeps two permutations of all records, 16 bytes for each.

    Returns:
        An iterator as of `make_batches`.

    Raises:
        UserError: the records do not fill a single batch.
    """
    _check_filled(num_records, batch_size, whole_epochs=True)
    rows = rows or range(batch_size)

    # Two, so that batches of one epoch may still be asked for when the next has begun.
    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(num_records)

    def make(index: int) -> dict[str, np.ndarray]:
        epoch, batch = divmod(index, num_records // batch_size)
        first = batch * batch_size
        positions = first + np.arange(rows.start, rows.stop)
        records = order(epoch)[positions] if draw is None else draw(epoch, positions)
        return {RECORDS: records, **take(records)}

    return iter(grain.MapDataset.range(sys.maxsize).map(make).to_iter_dataset(READING))


def in_processes(batches: grain.IterDataset, num_workers: int) -> grain.IterDataset:
    """The same dataset, read by `num_workers` processes, each its share; by none if that is 0."""
    if not num_workers:
        return batches
    if not flags.FLAGS.is_parsed():  # Grain's worker processes require parsed absl flags.
        flags.FLAGS.mark_as_parsed()
    return batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))


def _check_filled(num_records: int, batch_size: int, whole_epochs: bool) -> None:
    if num_records < (batch_size if whole_epochs else 1):
        raise UserError(
            f"{num_records} records do not fill one batch of {batch_size}; add records or use"
            " a smaller batch_size."
        )


@dataclasses.dataclass(frozen=True)
class _BatchMaker:
    """Makes batches of records, each with only the examples of this process."""

    source: RecordSource
    batch_size: int
    rows: range
    whole_epochs: bool

    def make(self, transform: Transform, seed: np.random.SeedSequence) -> grain.MapDataset:
        """All batches of one transform."""
        # Grain shuffles epoch e with seed + e, so adjacent seeds would repeat each other's epochs.
        shuffle_seed, transform_seed = seed.generate_state(2).tolist()
        order = grain.MapDataset.range(len(self.source)).shuffle(shuffle_seed)
        if self.whole_epochs:
            order = order[: len(order) // self.batch_size * self.batch_size]
        make = _ExampleMaker(self.source, transform)
        examples = order.repeat(None).random_map(make, seed=transform_seed)
        batches = _LocalExamples(examples, self.batch_size, self.rows)
        return batches.batch(len(self.rows), drop_remainder=True)


# Without a repr: Grain asks for it at the first batch, and that of all records takes a minute.
@dataclasses.dataclass(frozen=True, repr=False)
class _ExampleMaker:
    """Reads and transforms one record."""

    source: RecordSource
    transform: Transform

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return {RECORDS: np.int64(index), **self.transform(self.source[index], rng)}


class _LocalExamples(grain.MapDataset):
    """Of every `batch_size` consecutive elements, only those at `rows`; the others are never computed."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: range):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]
