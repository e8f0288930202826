"""Embedding and search split over the processes of one program (`core.processes.join`).

To build a memory, the leader (process 0) reads, filters and writes as a single process would; the followers
only encode their part of each batch that it sends. Parts are whole batches of the encoder, so that the files
are those of a single process if every document has a text and an image; otherwise embeddings may be rounded
differently.
To search, every process opens the memory, searches its part of the queries, and gathers the hits of all.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rag_mm.memory.model_protocols import Encoder, ImageTokenizer
from rag_mm.memory.writing import ingest

_END, _TEXT, _IMAGE, _CODES = range(4)


def local_slice(num_rows: int) -> slice:
    """This process's part of `num_rows` rows; parts are equal, but the last ones may be shorter or empty."""
    part = _part_size(num_rows)
    start = min(jax.process_index() * part, num_rows)
    return slice(start, min(start + part, num_rows))


def gather(local: np.ndarray, num_rows: int) -> np.ndarray:
    """All-gathers every process's `local_slice` into one array [num_rows, ...] on each process.

    Every process must call it, with parts of the same dtype and trailing shape.
    """
    if jax.process_count() == 1:
        return local
    padding = [(0, _part_size(num_rows) - len(local))] + [(0, 0)] * (local.ndim - 1)
    parts = multihost_utils.process_allgather(np.pad(local, padding), tiled=True)
    return np.asarray(parts)[:num_rows]


def documents_at_once(encoder: Encoder) -> int:
    """`Options.batch_size` for a build shared by all processes, which gives each of them a full batch."""
    return max(ingest.Options.batch_size, encoder.image_batch) * jax.process_count()


@contextlib.contextmanager
def lead(
    encoder: Encoder, tokenizer: ImageTokenizer | None
) -> Iterator[tuple[Encoder, ImageTokenizer | None]]:
    """On the leader: an encoder and a tokenizer whose work all processes share while the block runs.

    Followers meanwhile call `follow` with the same models; it returns when the block ends, even by an error.
    """
    if jax.process_count() == 1:
        yield encoder, tokenizer
        return
    models = _SharedModels(encoder, tokenizer)
    try:
        yield _SharedEncoder(models), None if tokenizer is None else _SharedTokenizer(models)
    finally:
        _send(_END, np.zeros(0, np.uint8))


def follow(encoder: Encoder, tokenizer: ImageTokenizer | None) -> None:
    """On a follower: encodes its part of what `lead` sends, until the leader's block ends."""
    models = _SharedModels(encoder, tokenizer)
    while True:
        kind, payload = _receive()
        if kind == _END:
            return
        models.encode(kind, payload)


class _SharedModels:
    """The models of one process; each process encodes its part of a payload."""

    def __init__(self, encoder: Encoder, tokenizer: ImageTokenizer | None):
        self.encoder = encoder
        self.tokenizer = tokenizer

    def lead(self, kind: int, payload: np.ndarray) -> np.ndarray:
        _send(kind, payload)
        return self.encode(kind, payload)

    def encode(self, kind: int, payload: np.ndarray) -> np.ndarray:
        if kind == _TEXT:
            texts = json.loads(payload.tobytes())
            return _share(self.encoder.encode_text, texts, self.encoder.text_batch)
        if kind == _IMAGE:
            return _share(self.encoder.encode_image, payload, self.encoder.image_batch)
        assert self.tokenizer is not None
        return _share(self.tokenizer.encode, payload, self.tokenizer.image_batch)


class _SharedEncoder:
    """An `Encoder` that runs on all processes; used by the leader."""

    def __init__(self, models: _SharedModels):
        self._models = models
        self.dim = models.encoder.dim
        self.fingerprint = models.encoder.fingerprint
        self.image_size = models.encoder.image_size
        self.image_batch = models.encoder.image_batch
        self.text_batch = models.encoder.text_batch

    def encode_text(self, texts: list[str]) -> np.ndarray:
        return self._models.lead(_TEXT, np.frombuffer(json.dumps(texts).encode(), np.uint8))

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self._models.lead(_IMAGE, pixels)


class _SharedTokenizer:
    """An `ImageTokenizer` that runs on all processes; used by the leader."""

    def __init__(self, models: _SharedModels):
        assert models.tokenizer is not None
        self._models = models
        self.fingerprint = models.tokenizer.fingerprint
        self.image_size = models.tokenizer.image_size
        self.image_batch = models.tokenizer.image_batch

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return self._models.lead(_CODES, pixels)


def _share(
    encode: Callable[[Any], np.ndarray], items: list[str] | np.ndarray, batch_size: int
) -> np.ndarray:
    """Encodes `items` on all processes.

    Each takes whole batches of `batch_size`, so that every item is encoded in a batch of the same size, and
    thus by the same program, as in a single process.
    """
    part = batch_size * _part_size(-(-len(items) // batch_size))
    # A process without a part encodes the last item, for the shape of the result.
    start = min(jax.process_index() * part, len(items) - 1)
    encoded = np.asarray(encode(items[start : start + part]))
    padding = [(0, part - len(encoded))] + [(0, 0)] * (encoded.ndim - 1)
    parts = multihost_utils.process_allgather(np.pad(encoded, padding), tiled=True)
    return np.asarray(parts)[: len(items)]


def _part_size(num_rows: int) -> int:
    return -(-num_rows // jax.process_count())


def _send(kind: int, payload: np.ndarray) -> None:
    shape = [*payload.shape, *[-1] * (4 - payload.ndim)]
    multihost_utils.broadcast_one_to_all(np.array([kind, *shape], np.int32))
    if payload.size:
        multihost_utils.broadcast_one_to_all(payload)


def _receive() -> tuple[int, np.ndarray]:
    """The kind of work and its uint8 payload, as the leader's `_send` broadcast them."""
    kind, *shape = np.asarray(multihost_utils.broadcast_one_to_all(np.zeros(5, np.int32))).tolist()
    payload = np.zeros([size for size in shape if size >= 0], np.uint8)
    if payload.size:
        payload = np.asarray(multihost_utils.broadcast_one_to_all(payload))
    return kind, payload
