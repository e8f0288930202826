"""How several processes share an encoding: each item in the batch that one process would encode it in."""

import types

import numpy as np
import pytest

from rag_mm.core import batches
from rag_mm.memory import shared_encoding


def _run(monkeypatch, index, count, encode, items, batch_size):
    """The rows that one of the processes hands to the others."""
    handed = []
    fake = types.SimpleNamespace(process_index=lambda: index, process_count=lambda: count)
    monkeypatch.setattr(shared_encoding, "jax", fake)
    gather = lambda rows, tiled: handed.append(rows) or rows
    monkeypatch.setattr(shared_encoding.multihost_utils, "process_allgather", gather)
    shared_encoding._share(encode, items, batch_size)
    return handed[0]


@pytest.mark.parametrize("num_items", [1, 4, 5, 9, 16, 23])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_each_item_is_encoded_in_a_batch_of_the_size_it_has_in_one_process(
    monkeypatch, num_items, num_processes
):
    def encode(items):
        """Each item beside the size of its batch."""
        parts = list(batches.split(len(items), 4))
        sizes = np.concatenate([np.full(len(part), len(part)) for part in parts])
        return np.stack([items, sizes[: len(items)]], axis=1)

    items = np.arange(10, 10 + num_items)
    parts = [
        _run(monkeypatch, index, num_processes, encode, items, 4) for index in range(num_processes)
    ]
    assert len({part.shape for part in parts}) == 1
    np.testing.assert_array_equal(np.concatenate(parts)[:num_items], encode(items))


def test_processes_share_the_work(monkeypatch):
    sizes = []

    def encode(items):
        sizes.append(len(items))
        return np.zeros((len(items), 1))

    for index in range(4):
        _run(monkeypatch, index, 4, encode, ["text"] * 31, 4)
    assert sizes == [8, 8, 8, 7]
