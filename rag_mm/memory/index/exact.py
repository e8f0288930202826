"""Exact inner-product search in JAX: the reference for other indexes, practical up to a million rows."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory.index import live_rows, protocol

_ROWS_PER_CHUNK = 32_768  # The scores of one chunk for 256 queries take 32 MiB.
_ROWS_PER_BLOCK = (
    1_024  # Small memories are padded to a multiple of this, so that sizes share a program.
)
_MAX_QUERIES = 256
_MIN_QUERIES = 8


class ExactIndex:
    """Rows on one device, scored in float32; among equal scores the smaller id comes first."""

    kind = "exact"

    def __init__(self):
        self._rows: np.ndarray | None = None
        self._live: live_rows.LiveRows | None = None
        self._chunks: jax.Array | None = None
        self._masks: jax.Array | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows, excluding removed ones."""
        return 0 if self._live is None else len(self._live)

    def build(self, embeddings: np.ndarray) -> None:
        """Replaces the rows; see `Index.build`."""
        rows = protocol.check_rows(embeddings)
        chunk = min(_ROWS_PER_CHUNK, _round_up(max(len(rows), 1), _ROWS_PER_BLOCK))
        padded = np.zeros((_round_up(max(len(rows), 1), chunk), rows.shape[1]), np.float32)
        padded[: len(rows)] = rows
        self._rows = rows
        self._chunks = jnp.asarray(padded.reshape(-1, chunk, rows.shape[1]))
        self._set_live(live_rows.LiveRows(len(rows)))

    def add(self, embeddings: np.ndarray) -> None:
        """Appends rows; see `Index.add`."""
        if self._rows is None or self._live is None:
            self.build(embeddings)
            return
        embeddings = protocol.check_rows(embeddings, self._rows.shape[1])
        self.build(np.concatenate([self._rows[self._live.stored], embeddings]))

    def remove(self, ids: np.ndarray) -> None:
        """Removes rows without copying the others; see `Index.remove`."""
        self._set_live(protocol.require_rows(self._live).without(ids))

    def _set_live(self, live: live_rows.LiveRows) -> None:
        assert self._chunks is not None
        masks = np.zeros(self._chunks.shape[:2], bool)
        masks.reshape(-1)[: live.num_stored] = live.mask
        self._live, self._masks = live, jnp.asarray(masks)

    def search(self, queries: np.ndarray, k: int) -> protocol.Neighbors:
        """The best k rows for each query; see `Index.search`."""
        dim = None if self._rows is None else self._rows.shape[1]
        queries = protocol.check_queries(queries, k, dim)
        return protocol.search_batches(self._search_batch, self._live, queries, k, _MAX_QUERIES)

    def _search_batch(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        bucket = max(_MIN_QUERIES, 1 << (len(queries) - 1).bit_length())
        padded = np.zeros((bucket, queries.shape[1]), np.float32)
        padded[: len(queries)] = queries
        ids, scores = _top_k(self._chunks, self._masks, jnp.asarray(padded), k)
        return np.asarray(ids)[: len(queries)], np.asarray(scores)[: len(queries)]

    def save(self, directory: Path) -> None:
        """Writes the index's description; see `Index.save`."""
        files.write_json(directory / "index.json", {"kind": self.kind, "rows": self.num_rows})

    def load(self, directory: Path, embeddings: np.ndarray) -> None:
        """Reads what `save` wrote; see `Index.load`."""
        saved = files.read_json(directory / "index.json")
        if saved != {"kind": self.kind, "rows": len(embeddings)}:
            raise UserError(
                f"{directory / 'index.json'} does not describe an exact index over "
                f"{len(embeddings)} rows: the memory is damaged; build it again."
            )
        self.build(embeddings)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@functools.partial(jax.jit, static_argnames="k")
def _top_k(
    chunks_crd: jax.Array, masks_cr: jax.Array, queries_qd: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """The best k of the unmasked rows: ids int32 [Q, k] and scores float32 [Q, k]."""
    num_queries, chunk = queries_qd.shape[0], chunks_crd.shape[1]

    def visit(best, chunk_mask_start):
        rows_rd, mask_r, start = chunk_mask_start
        scores_qr = jnp.einsum(
            "qd,rd->qr",
            queries_qd,
            rows_rd,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        ids_r = start + jnp.arange(chunk, dtype=jnp.int32)
        scores_qr = jnp.where(mask_r[None, :], scores_qr, -jnp.inf)
        scores, columns = jax.lax.top_k(scores_qr, min(k, chunk))
        # Earlier hits come first, as they have smaller ids and top_k prefers the first of equal scores.
        scores = jnp.concatenate([best[1], scores], axis=1)
        ids = jnp.concatenate([best[0], ids_r[columns]], axis=1)
        scores, columns = jax.lax.top_k(scores, k)
        return (jnp.take_along_axis(ids, columns, axis=1), scores), None

    no_hits = (
        jnp.full((num_queries, k), protocol.MISSING, jnp.int32),
        jnp.full((num_queries, k), -jnp.inf, jnp.float32),
    )
    starts = chunk * jnp.arange(chunks_crd.shape[0], dtype=jnp.int32)
    (ids, scores), _ = jax.lax.scan(visit, no_hits, (chunks_crd, masks_cr, starts))
    return ids, scores
