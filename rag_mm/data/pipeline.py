"""Batches of random-access records by Grain, decided by (seed, index), resumable to the item."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import grain
import numpy as np
from absl import flags

from rag_mm.core.errors import UserError

T = TypeVar("T", covariant=True)


class Source(Protocol[T]):
    """Records that can be read in any order, by several threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> T: ...


Transform = Callable[[T, np.random.Generator], dict[str, Any]]


def make_batches(
    source: Source[T],
    batch_size: int,
    seed: int,
    *transforms: Transform,
    shares: Sequence[float] = (1.0,),
    num_epochs: int | None = None,
    start: int = 0,
    num_workers: int = 0,
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

    Returns:
        An iterator over dicts of arrays [batch_size, ...]. `get_state()` is a JSON value that
        `set_state` of an iterator made with the same arguments accepts.

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
    kinds = [
        (_make_kind(source, batch_size, kind_seed, transform, num_epochs), float(share))
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


def _make_kind(
    source: Source[T],
    batch_size: int,
    seed: np.random.SeedSequence,
    transform: Transform,
    num_epochs: int | None,
) -> grain.MapDataset:
    # Grain shuffles epoch e with its seed + e: adjacent seeds must not be one epoch apart.
    shuffle_seed, transform_seed = seed.generate_state(2).tolist()
    return (
        grain.MapDataset.source(source)
        .shuffle(shuffle_seed)
        .repeat(num_epochs)
        .random_map(transform, seed=transform_seed)
        .batch(batch_size, drop_remainder=True)
    )
