"""Packs training sequences of different lengths into rows of one length; none is cut or dropped."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import grain
import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data import pipeline

Row = dict[str, np.ndarray]
# Sequences packed together. The more there are, the fuller the rows: at most one of them is left half empty.
WINDOW = 1024


def make_packed_batches(
    source: pipeline.RecordSource,
    batch_size: int,
    seed: int,
    transform: pipeline.Transform,
    length: int,
    *,
    padding: dict[str, int],
    rows: range | None = None,
    num_workers: int = 0,
    window: int = WINDOW,
    lengths: Mapping[str, int] | None = None,
    by: str = "segment_ids",
    finish: Callable[[Row], Row] = lambda batch: batch,
) -> grain.DatasetIterator[Row]:
    """Shuffles and transforms records, packs the results and batches them, without end.

    Every `window` consecutive examples are packed together, the longest first, each into the fullest row that
    has room. `seed` and i determine example i as in `pipeline.make_batches`.

    Args:
        source: the records.
        batch_size: rows per batch.
        seed: at least 0.
        transform: turns one record into arrays [T] of any T up to `length`, among them `segment_ids`.
        length: tokens in a row.
        padding: the value that fills the end of a row, by name of an array; 0 elsewhere.
        rows: which rows of each batch to return, if other processes take the rest; None returns all. Every
            process makes all sequences, so that all are at the same place.
        num_workers: processes that make and pack sequences; 0 uses a thread of this process. Each worker
            packs windows of its own, so that the rows, but not the sequences in them, depend on the number.
        window: examples packed together.
        lengths: of arrays that are not one per token, such as the images of a sequence, how many a row holds
            at most, by name; they are joined like tokens.
        by: the array whose lengths decide which sequences share a row: `segment_ids`, or one of `lengths`.
        finish: what is done with the arrays of a batch at last, where it is read.

    Returns:
        An iterator over arrays [batch_size, length] by name; `segment_ids` number the sequences of a row from
        1, and `pipeline.RECORDS` has the record of each token, -1 in padding. Its state is as of
        `pipeline.make_batches`.

    Raises:
        UserError: there are no records.
    """
    if not len(source):
        raise UserError("There are no records to pack; give at least one.")
    rows, padding = rows or range(batch_size), {pipeline.RECORDS: -1, **padding}
    shuffle_seed, transform_seed = np.random.SeedSequence(seed).generate_state(2).tolist()

    def make(index: int, rng: np.random.Generator) -> Row:
        row = transform(source[index], rng)
        return row | {pipeline.RECORDS: np.full(len(row["segment_ids"]), index, np.int64)}

    examples = grain.MapDataset.range(len(source)).shuffle(shuffle_seed).repeat(None)
    windows = examples.random_map(make, seed=transform_seed).batch(
        window,
        batch_fn=functools.partial(pack, length=length, padding=padding, lengths=lengths, by=by),
    )
    packed = grain.experimental.FlatMapIterDataset(
        windows.to_iter_dataset(pipeline.READING), _Rows(max_fan_out=window)
    )
    batches = packed.batch(batch_size, drop_remainder=True)
    shares = batches.map(
        lambda batch: finish({k: v[rows.start : rows.stop] for k, v in batch.items()})
    )
    return iter(pipeline.in_processes(shares, num_workers))


def pack(
    examples: Sequence[Row],
    length: int,
    padding: dict[str, int],
    lengths: Mapping[str, int] | None = None,
    by: str = "segment_ids",
) -> list[Row]:
    """Packs sequences, the longest first, each into the fullest row that has room; all arguments as above.

    Returns:
        Rows of arrays [length], or as `lengths` says, in an order that does not depend on how long their
        sequences are.

    Raises:
        ValueError: a sequence is longer than a row, or has more of what `lengths` bounds.
    """
    lengths = lengths or {}
    room = {"segment_ids": length, **lengths}
    sizes = np.array([[len(example[name]) for name in room] for example in examples])
    for name, longest, most in zip(room, sizes.max(axis=0), room.values(), strict=True):
        if longest > most:
            what = "tokens" if name == "segment_ids" else name
            raise ValueError(f"a sequence of {longest} {what} is longer than a row of {most}")
    free = np.tile(list(room.values()), (len(examples), 1))
    bins: list[list[Row]] = [[] for _ in examples]
    column = list(room).index(by)
    for i in np.argsort(-sizes[:, column], kind="stable"):
        # Unused bins are the emptiest, so one is opened only if nothing else has room.
        fits = (free >= sizes[i]).all(axis=1)
        at = int(np.where(fits, free[:, column], room[by] + 1).argmin())
        bins[at].append(examples[i])
        free[at] -= sizes[i]
    filled = [group for group in bins if group]
    order = np.random.default_rng(len(filled)).permutation(len(filled))
    return [join(filled[i], length, padding, lengths) for i in order]


def join(
    examples: Sequence[Row], length: int, padding: dict[str, int], lengths: Mapping[str, int]
) -> Row:
    """One row of some sequences that fit it; arguments as of `make_packed_batches`."""
    row = {}
    for name in examples[0]:
        parts = [
            number * example[name] if name == "segment_ids" else example[name]
            for number, example in enumerate(examples, start=1)
        ]
        values = np.concatenate(parts).astype(parts[0].dtype)
        missing = lengths.get(name, length) - len(values)
        row[name] = np.pad(values, (0, missing), constant_values=padding.get(name, 0))
    return row


def join_flat(
    flat: Row, lengths: np.ndarray, counts: Sequence[int], length: int, padding: Mapping[str, int]
) -> Row:
    """Rows of sequences that lie one after another.

    Args:
        flat: arrays [T] of all sequences.
        lengths: tokens of each sequence, int [N].
        counts: sequences of each of R rows, N in all.
        length: tokens in a row.
        padding: as of `make_packed_batches`.

    Returns:
        Arrays [R, length], as `join` makes them.

    Raises:
        ValueError: the sequences of a row do not fit it.
    """
    row = np.repeat(np.arange(len(counts)), counts)
    used = np.bincount(row, weights=lengths, minlength=len(counts))
    if len(used) and used.max() > length:
        raise ValueError(f"sequences of {used.max():.0f} tokens do not fit a row of {length}")
    is_filled = np.arange(length) < used[:, None]
    first = np.cumsum(counts) - counts
    number = np.repeat(np.arange(len(row)) - first[row] + 1, lengths)
    made = {}
    for name, values in flat.items():
        made[name] = np.full(is_filled.shape, padding.get(name, 0), values.dtype)
        made[name][is_filled] = number if name == "segment_ids" else values
    return made


@dataclasses.dataclass(frozen=True)
class _Rows(grain.experimental.FlatMapTransform):
    max_fan_out: int

    def flat_map(self, element: Sequence[Row]) -> Sequence[Row]:
        return element
