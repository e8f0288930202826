"""Batches of few sizes: compiled functions compile for few shapes and compute little beyond the request."""

from collections.abc import Iterator

import numpy as np


def split(num_rows: int, batch_size: int, multiple: int = 1) -> Iterator[np.ndarray]:
    """The row numbers of each batch: full batches, then the rest padded to the next power of two.

    The padding repeats the last row, so the concatenated results of all batches, cut to `num_rows`, are those
    of the rows. At most log2(batch_size) + 2 sizes occur, and fewer than 2 * num_rows rows are computed.

    Args:
        num_rows: number of rows.
        batch_size: size of a full batch, at least 1; the rest is not padded beyond it.
        multiple: every size is rounded up to a multiple of it, for batches split over devices.

    Yields:
        int [B] per batch.
    """
    batch_size += -batch_size % multiple
    for start in range(0, num_rows, batch_size):
        size = min(batch_size, 1 << (num_rows - start - 1).bit_length())
        size += -size % multiple
        yield np.minimum(start + np.arange(size), num_rows - 1)
