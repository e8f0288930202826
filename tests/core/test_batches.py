"""Batches: every row once and in order, few sizes, little padding."""

import numpy as np
import pytest

from rag_mm.core import batches


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "sizes"),
    [
        (1, 256, [1]),
        (3, 256, [4]),
        (256, 256, [256]),
        (300, 256, [256, 64]),
        (257, 256, [256, 1]),
        (70, 100, [100]),  # Not padded beyond a full batch.
        (9, 4, [4, 4, 1]),
        (0, 4, []),
    ],
)
def test_full_batches_and_a_rest_of_a_power_of_two(num_rows, batch_size, sizes):
    parts = list(batches.split(num_rows, batch_size))
    assert [len(part) for part in parts] == sizes
    rows = np.concatenate([*parts, np.zeros(0, int)])
    assert rows[:num_rows].tolist() == list(range(num_rows))
    assert (rows[num_rows:] == num_rows - 1).all()


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_few_sizes_and_never_twice_the_work(batch_size):
    seen = set()
    for num_rows in range(1, 200):
        sizes = [len(part) for part in batches.split(num_rows, batch_size)]
        assert sum(sizes) < 2 * num_rows
        seen.update(sizes)
    assert len(seen) <= batch_size.bit_length() + 1 and max(seen) == batch_size


def test_sizes_are_multiples_of_the_devices():
    assert [len(part) for part in batches.split(11, 6, multiple=4)] == [8, 4]
    assert [len(part) for part in batches.split(1, 2, multiple=8)] == [8]
