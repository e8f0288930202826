"""Documents whose id an earlier document of another shard has, found in constant memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rag_mm.core import files

_AT_ONCE = 1 << 22  # Hashes that are sorted together.


def hash_ids(names: Iterable[str]) -> np.ndarray:
    """The first 64 bits of each id's SHA-256, uint64 [D]."""
    hashes = [int(files.digest(name.encode())[:16], 16) for name in names]
    return np.array(hashes, np.uint64)


def find_repeated(paths: Sequence[Path]) -> np.ndarray:
    """The documents whose hash an earlier one has, numbered over all files, int64 [M], ascending.

    Args:
        paths: files of `hash_ids`, in order.
    """
    shards = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    num_buckets = 1 << max(0, int(starts[-1]) // _AT_ONCE).bit_length()
    shift = np.uint64(65 - num_buckets.bit_length())
    found = []
    for bucket in range(num_buckets):
        hashes, numbers = [], []
        for shard, start in zip(shards, starts[:-1], strict=True):
            in_bucket = np.arange(len(shard))
            if num_buckets > 1:
                in_bucket = np.flatnonzero((shard >> shift) == bucket)
            hashes.append(shard[in_bucket])
            numbers.append(in_bucket + start)
        together, at = np.concatenate(hashes), np.concatenate(numbers)
        order = np.argsort(together, kind="stable")
        is_repeat = np.zeros(len(order), bool)
        is_repeat[1:] = together[order][1:] == together[order][:-1]
        found.append(at[order[is_repeat]])
    return np.sort(np.concatenate(found)).astype(np.int64)


class SortedHashes:
    """Finds hashes among `hash_ids` of many ids."""

    def __init__(self, hashes: np.ndarray):
        """Sorts them; uint64 [D]."""
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Where hashes, uint64 [N], are, int64 [N]; -1 where they are not."""
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)
