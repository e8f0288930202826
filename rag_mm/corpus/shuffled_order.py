"""A random order of any number of documents, computed where it is needed: a global shuffle without memory."""

import numpy as np

_ROUNDS = 6


def permute(positions: np.ndarray, size: int, *seed: int) -> np.ndarray:
    """What stands at these positions in a random order of 0 .. size - 1.

    A Feistel network permutes the next power of four; what falls outside is permuted again (cycle walking,
    Black and Rogaway 2002).

    Args:
        positions: int [N], from 0 to `size` - 1.
        size: at least 1.
        seed: non-negative integers; each gives another order.

    Returns:
        int64 [N].
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)
    values = np.asarray(positions).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3: every bit of the result depends on all bits of the value."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))
