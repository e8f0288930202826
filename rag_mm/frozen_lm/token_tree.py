"""Texts that share beginnings as a tree of tokens, so that no token is computed twice.

The beginning that all texts share, such as the examples of a few-shot prompt, is the trunk, which is computed
once. The rest is packed into chunks: a chunk holds some tokens in a row, and a mask by which each token sees
its own text's earlier tokens and nothing else.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BUCKETS = (64, 128, 256, 512)
"""Lengths of a trunk or a chunk; longer ones are powers of two."""
MIN_TRUNK = 8
"""A shorter shared beginning is computed with each chunk, which is cheaper than a call of its own."""


class Row(NamedTuple):
    """A text's token ids, and the number of the first one whose log-probability counts, at least 1."""

    ids: tuple[int, ...]
    start: int


class Target(NamedTuple):
    """A token whose log-probability counts: after which token of the chunk, its id, and its row."""

    after: int
    token: int
    row: int


class Chunk(NamedTuple):
    """Tokens behind the trunk.

    Attributes:
        tokens: ids, int32 [T].
        depths: positions, the trunk's length for the first one after it, int32 [T].
        parents: the chunk's token before each one; -1 for the first ones after the trunk.
        targets: what is asked for, those after the same token next to each other.
    """

    tokens: np.ndarray
    depths: np.ndarray
    parents: np.ndarray
    targets: list[Target]

    def mask(self, length: int) -> np.ndarray:
        """Which of the chunk's tokens each one sees: itself and those before it; bool [length, length].

        Padding, from T to `length`, sees itself.
        """
        seen = np.eye(length, dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def bucket(count: int) -> int:
    """The length that a trunk or chunk of `count` tokens is padded to."""
    fitting = [size for size in BUCKETS if size >= count]
    return fitting[0] if fitting else 1 << (count - 1).bit_length()


def trunk_of(rows: Sequence[Row]) -> tuple[int, ...]:
    """The ids that all rows begin with, up to the one before the first that counts; empty if they are few.

    The last token before a target stays outside, since its hidden state is needed.
    """
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    most = min(row.start for row in rows) - 1
    shared = 0
    for a, b in zip(first[:most], last[:most], strict=False):
        if a != b:
            break
        shared += 1
    return first[:shared] if shared >= MIN_TRUNK else ()


def chunks(rows: Sequence[Row], num_shared: int, capacity: int = BUCKETS[-1]) -> Iterator[Chunk]:
    """The tokens of all rows behind the first `num_shared`, at most `capacity` per chunk where rows allow.

    The last token of a row is a target only, so it is not among them.
    """
    order = sorted(range(len(rows)), key=lambda number: rows[number].ids)
    nodes: dict[tuple[int, ...], int] = {}
    targets: list[Target] = []
    for number in order:
        ids, start = rows[number]
        starts = range(num_shared + 1, len(ids))  # The ids up to each token that is computed.
        new = sum(ids[num_shared:end] not in nodes for end in starts)
        if nodes and len(nodes) + new > capacity:
            yield _make(nodes, targets, num_shared)
            nodes, targets = {}, []
        for end in starts:
            nodes.setdefault(ids[num_shared:end], len(nodes))
        targets += [
            Target(nodes[ids[num_shared:end]], ids[end], number) for end in range(start, len(ids))
        ]
    if nodes:
        yield _make(nodes, targets, num_shared)


def _make(nodes: dict[tuple[int, ...], int], targets: list[Target], num_shared: int) -> Chunk:
    tokens = np.array([path[-1] for path in nodes], np.int32)
    depths = np.array([num_shared + len(path) - 1 for path in nodes], np.int32)
    parents = np.array([nodes.get(path[:-1], -1) for path in nodes], np.int32)
    return Chunk(tokens, depths, parents, sorted(targets))
