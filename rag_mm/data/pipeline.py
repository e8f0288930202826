"""Batches of random-access records by Grain, decided by (seed, index), resumable to the item."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import grain
import numpy as np
from absl import flags

from rag_mm.core.errors import UserError

T = TypeVar("T", covariant=True)

# Key of a batch under which it says which records, int64 [B], it was made of.
RECORDS = "records"


class RecordSource(Protocol[T]):
    """Records that can be read in any order, by several threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T: ...


Transform = Callable[[T, np.random.Generator], dict[str, Any]]


def make_batches(
    source: RecordSource[T],
    batch_size: int,
    seed: int,
    *transforms: Transform,
    shares: Sequence[float] = (1.0,),
    num_epochs: int | None = None,
    start: int = 0,
    num_workers: int = 0,
    rows: range | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Shuffles, transforms and stacks records, for ever or for some epochs.

    Every epoch has its own order. Example i of the whole run is decided by `seed` and i alone: its
    record, and the generator that `transform` gets. So batches do not depend on threads, workers
    or interruptions. A batch may span two epochs; what remains after the last epoch is dropped.

    Args:
        source: the records.
        batch_size: examples in a batch.
        seed: at least 0.
        transforms: each makes arrays (or numbers) of one record, always of the same shapes. It runs
            in a thread beside the caller, or, with workers, is sent to them by pickling. With
            several a batch is all of one kind, since only rows of one shape can be stacked; each
            kind shuffles the records anew.
        shares: how often a batch is of each kind, evenly interleaved.
        num_epochs: of each kind; None never ends.
        start: the first batch to give; an iterator's state counts from there.
        num_workers: processes that read and transform; 0 does so in this process.
        rows: which of a batch's rows to make, where other processes make the others
            (`sharding.local_rows`); None makes all. The state does not depend on it.

    Returns:
        An iterator over dicts of arrays [batch_size, ...], `RECORDS` among them. `get_state()` is a JSON
        value that `set_state` of an iterator made with the same arguments accepts.

    Raises:
        UserError: there is not even one batch.
        ValueError: transforms and shares do not pair.
    """
    num_records = len(source)
    if not num_records or (num_epochs is not None and num_records * num_epochs < batch_size):
        raise UserError(
            f"{num_records} records do not fill one batch of {batch_size}; add records or take"
            " a smaller batch_size."
        )
    seeds = np.random.SeedSequence(seed).spawn(len(transforms))
    chosen = _Chosen(source, batch_size, rows or range(batch_size), num_epochs)
    kinds = [
        (chosen.make_kind(transform, kind_seed), float(share))
        for transform, share, kind_seed in zip(transforms, shares, seeds, strict=True)
        if share > 0
    ]
    dataset = grain.MapDataset.mix(*zip(*kinds, strict=True))
    # One thread beside the training step: more would only wait for Python's lock.
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    batches = dataset[start:].to_iter_dataset(reading)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain's processes insist, and who calls us has no flags.
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(batches)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Records in batches, of each the rows that one process makes."""

    source: RecordSource
    batch_size: int
    rows: range
    num_epochs: int | None

    def make_kind(self, transform: Transform, seed: np.random.SeedSequence) -> grain.MapDataset:
        """All batches of one kind."""
        # Grain shuffles epoch e with its seed + e: adjacent seeds must not be one epoch apart.
        shuffle_seed, transform_seed = seed.generate_state(2).tolist()
        examples = (
            grain.MapDataset.range(len(self.source))
            .shuffle(shuffle_seed)
            .repeat(self.num_epochs)
            .random_map(
                functools.partial(_make_example, self.source, transform), seed=transform_seed
            )
        )
        batches = _RowsOfBatches(examples, self.batch_size, self.rows)
        return batches.batch(len(self.rows), drop_remainder=True)


def _make_example(
    source: RecordSource, transform: Transform, index: int, rng: np.random.Generator
) -> dict[str, Any]:
    return {RECORDS: np.int64(index), **transform(source[index], rng)}


class _RowsOfBatches(grain.MapDataset):
    """Of every `batch_size` elements in a row those at `rows`; nothing is made of the others."""

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
