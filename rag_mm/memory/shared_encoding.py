"""Embedding and searching shared by several processes of one program (`core.processes.join`).

Process 0 reads, decides and writes as it would alone; the others do nothing but encode their part of what it
sends them. So the files are those of one process, whatever happens to a record on the way. Searching needs
no such order: every process opens the memory, takes its part of the queries, and all get all hits.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rag_mm.memory.model_protocols import Encoder, ImageTokenizer

_END, _TEXT, _IMAGE, _CODES = range(4)


def own_part(num_rows: int) -> slice:
    """The rows that are this process's: equal parts, of which the last ones may be shorter or empty."""
    part = _part_size(num_rows)
    start = min(jax.process_index() * part, num_rows)
    return slice(start, min(start + part, num_rows))


def gather(own: np.ndarray, num_rows: int) -> np.ndarray:
    """Every process's `own_part` of [num_rows, ...], as one array in each of them.

    All processes call it, with parts of one shape and dtype apart from their rows.
    """
    if jax.process_count() == 1:
        return own
    padding = [(0, _part_size(num_rows) - len(own))] + [(0, 0)] * (own.ndim - 1)
    parts = multihost_utils.process_allgather(np.pad(own, padding), tiled=True)
    return np.asarray(parts)[:num_rows]


@contextlib.contextmanager
def lead(
    encoder: Encoder, tokenizer: ImageTokenizer | None
) -> Iterator[tuple[Encoder, ImageTokenizer | None]]:
    """For process 0: an encoder and a tokenizer whose work all processes share, while the block runs.

    The others call `follow` with the same models meanwhile; the end of the block ends it, also by an error.
    """
    if jax.process_count() == 1:
        yield encoder, tokenizer
        return
    team = _Team(encoder, tokenizer)
    try:
        yield _SpreadEncoder(team), None if tokenizer is None else _SpreadTokenizer(team)
    finally:
        _send(_END, np.zeros(0, np.uint8))


def follow(encoder: Encoder, tokenizer: ImageTokenizer | None) -> None:
    """For the other processes: encodes what `lead` sends, until it ends."""
    team = _Team(encoder, tokenizer)
    while True:
        kind, payload = _receive()
        if kind == _END:
            return
        team.encode(kind, payload)


class _Team:
    """The models of one process, and its part of a piece of work."""

    def __init__(self, encoder: Encoder, tokenizer: ImageTokenizer | None):
        self.encoder = encoder
        self.tokenizer = tokenizer

    def lead(self, kind: int, payload: np.ndarray) -> np.ndarray:
        _send(kind, payload)
        return self.encode(kind, payload)

    def encode(self, kind: int, payload: np.ndarray) -> np.ndarray:
        if kind == _TEXT:
            return _share(self.encoder.encode_text, json.loads(payload.tobytes()))
        if kind == _IMAGE:
            return _share(self.encoder.encode_image, payload)
        assert self.tokenizer is not None
        return _share(self.tokenizer.encode, payload)


class _SpreadEncoder:
    """An `Encoder` of the whole team."""

    def __init__(self, team: _Team):
        self._team = team
        self.dim = team.encoder.dim
        self.fingerprint = team.encoder.fingerprint
        self.image_size = team.encoder.image_size

    def encode_text(self, texts: list[str]) -> np.ndarray:
        return self._team.lead(_TEXT, np.frombuffer(json.dumps(texts).encode(), np.uint8))

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self._team.lead(_IMAGE, pixels)


class _SpreadTokenizer:
    """A `Tokenizer` of the whole team."""

    def __init__(self, team: _Team):
        assert team.tokenizer is not None
        self._team = team
        self.fingerprint = team.tokenizer.fingerprint
        self.image_size = team.tokenizer.image_size

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return self._team.lead(_CODES, pixels)


def _share(encode: Callable[[Any], np.ndarray], items: list[str] | np.ndarray) -> np.ndarray:
    """Each process encodes as many items, so that all compile one program; the last ones repeat."""
    part = _part_size(len(items))
    places = jax.process_index() * part + np.arange(part)
    places = np.minimum(places, len(items) - 1)
    own = items[places] if isinstance(items, np.ndarray) else [items[place] for place in places]
    encoded = encode(own)
    parts = multihost_utils.process_allgather(np.asarray(encoded), tiled=True)
    return np.asarray(parts)[: len(items)]


def _part_size(num_rows: int) -> int:
    return -(-num_rows // jax.process_count())


def _send(kind: int, payload: np.ndarray) -> None:
    shape = [*payload.shape, *[-1] * (4 - payload.ndim)]
    multihost_utils.broadcast_one_to_all(np.array([kind, *shape], np.int32))
    if payload.size:
        multihost_utils.broadcast_one_to_all(payload)


def _receive() -> tuple[int, np.ndarray]:
    """The kind of work and its uint8 payload, as `_send` of process 0 gave them."""
    kind, *shape = np.asarray(multihost_utils.broadcast_one_to_all(np.zeros(5, np.int32))).tolist()
    payload = np.zeros([size for size in shape if size >= 0], np.uint8)
    if payload.size:
        payload = np.asarray(multihost_utils.broadcast_one_to_all(payload))
    return kind, payload
