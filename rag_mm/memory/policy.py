"""The retrieval policy: how queries are made and hits selected (docs/papers/ra_cm3.md#retrieval)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from rag_mm.core import document_types, files
from rag_mm.memory.index import protocol
from rag_mm.memory.store.mapped_rows import MappedRows

NO_KEY = -1
"""The fact key of a memory row or query whose facts are unknown: it equals no other key."""


@dataclasses.dataclass(frozen=True, eq=False)
class EqualCodes:
    """Redundancy of images by their codes, for retrievers that give all images of a class nearly one cosine.

    Attributes:
        max_share: a row is redundant if a larger share of its codes equals, position by position, the codes
            of the query's image or of a row already kept.
        read_rows: maps memory rows, int [...], to their codes, int [..., N], -1 for a row without an image.
        queries: int [Q, N], the codes of the queries' images; None for text queries.
    """

    max_share: float
    read_rows: Callable[[np.ndarray], np.ndarray]
    queries: np.ndarray | None = None

    def take(self, batch: slice | np.ndarray) -> "EqualCodes":
        """The same for some of the queries."""
        queries = None if self.queries is None else self.queries[batch]
        return dataclasses.replace(self, queries=queries)


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a run retrieves, in training and at inference.

    Attributes:
        max_similarity: largest cosine of a hit to the query and to another hit; None for no bound.
        max_equal_codes: largest share of equal codes (`EqualCodes.max_share`); 1 for no bound.
        split_phrases: whether captions are split into phrases (`split_queries`).
    """

    max_similarity: float | None = None
    max_equal_codes: float = 1.0
    split_phrases: bool = False

    def bounds(
        self,
        read_codes: Callable[[np.ndarray], np.ndarray] | None,
        query_codes: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """The arguments `max_similarity` and `equal_codes` of `find_neighbors`.

        Args:
            read_codes: see `EqualCodes.read_rows`; None for a memory without codes, which has no such bound.
            query_codes: int [Q, N], the codes of image queries.
        """
        equal_codes = None
        if self.max_equal_codes < 1 and read_codes is not None:
            equal_codes = EqualCodes(self.max_equal_codes, read_codes, query_codes)
        return {"max_similarity": self.max_similarity, "equal_codes": equal_codes}


def equal_share(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share of positions with the same code, of int [..., N] and [..., N]; -1 equals nothing."""
    return ((ours == theirs) & (ours >= 0)).mean(axis=-1)


def make_query(
    document: document_types.Document,
    modality: Literal["text", "image"],
    rng: np.random.Generator | None = None,
    word_dropout: float = 0.2,
) -> str | np.ndarray:
    """One modality of a document as a query, so that in training the query never contains the whole target.

    Args:
        document: the main document.
        modality: which modality becomes the query.
        rng: for query dropout: drops each word with probability `word_dropout` but keeps at least one.
            None drops nothing (inference). Dropout applies to text only.
        word_dropout: the probability.

    Returns:
        A text, or an image as uint8 [H, W, 3].

    Raises:
        ValueError: the document lacks that modality.
    """
    if modality == "image":
        if document.image is None:
            raise ValueError(f"document {document.id!r} has no image to use as a query")
        return document.image
    words = document.text.split()
    if not words:
        raise ValueError(f"document {document.id!r} has no text to use as a query")
    if rng is None:
        return document.text
    uniform = rng.random(len(words))
    kept = [word for word, value in zip(words, uniform, strict=True) if value >= word_dropout]
    return " ".join(kept) if kept else words[int(uniform.argmax())]


def split_queries(texts: Sequence[str], split_phrases: bool) -> tuple[list[str], np.ndarray]:
    """Turns Q texts into P >= Q queries.

    One embedding seldom represents two entities. `split_phrases` therefore splits each text at " and " and
    makes one query of each phrase. It also splits names such as `bow and arrow`.

    Returns:
        The queries, and the number of consecutive queries that belong to each text, int64 [Q].
    """
    phrases = [
        (split_phrases and [part for part in text.split(" and ") if part.strip()]) or [text]
        for text in texts
    ]
    counts = np.array([len(parts) for parts in phrases], np.int64)
    return [part for parts in phrases for part in parts], counts


def interleave(hits: protocol.Neighbors, counts: np.ndarray) -> protocol.Neighbors:
    """Merges the hits of one document's queries: all first hits by score, then all second hits, and so on.

    Args:
        hits: [P, k], best first.
        counts: int [Q], how many consecutive queries belong together; they sum to P.

    Returns:
        Neighbors [Q, k max(counts)], sorted by score only among hits of equal rank. Of a row that several
        queries found, only the first occurrence is kept; the others become missing hits.
    """
    num_hits, max_count = hits.ids.shape[1], int(counts.max(initial=1))
    if max_count == 1:
        return hits
    group = np.repeat(np.arange(len(counts)), counts)
    part = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.full((len(counts), num_hits, max_count), protocol.MISSING, np.int32)
    scores = np.full(ids.shape, -np.inf, np.float32)
    ids[group, :, part], scores[group, :, part] = hits.ids, hits.scores
    order = np.argsort(-scores, axis=2, kind="stable")
    flat_ids = np.take_along_axis(ids, order, axis=2).reshape(len(counts), -1)
    flat_scores = np.take_along_axis(scores, order, axis=2).reshape(len(counts), -1)
    by_id = np.argsort(flat_ids, axis=1, kind="stable")
    repeats_previous = np.diff(np.take_along_axis(flat_ids, by_id, axis=1), axis=1, prepend=-2) == 0
    is_repeat = np.zeros_like(repeats_previous)
    np.put_along_axis(is_repeat, by_id, repeats_previous, axis=1)
    flat_ids = np.where(is_repeat, np.int32(protocol.MISSING), flat_ids)
    return protocol.Neighbors(flat_ids, np.where(is_repeat, np.float32(-np.inf), flat_scores))


def fact_key(facts: str) -> int:
    """A number in [0, 2^63) that identifies a document's facts; equal facts have equal keys."""
    return int(files.digest(facts.encode())[:16], 16) >> 1


def select(
    ids: np.ndarray,
    scores: np.ndarray,
    vectors: np.ndarray | MappedRows,
    *,
    num_neighbors: int,
    max_similarity: float | None,
    query_rows: np.ndarray,
    query_keys: np.ndarray,
    row_keys: np.ndarray,
    equal_codes: EqualCodes | None = None,
) -> protocol.Neighbors:
    """Keeps the first K of each query's ranked hits that are neither the query itself nor near-duplicates.

    Skips missing hits, the query's own row, rows with the query's fact key, and redundant rows: more similar
    than `max_similarity` to the query (their score) or to a row already kept, or with too many equal codes.

    Args:
        ids: int32 [Q, k] hits, best first, -1 where missing.
        scores: float32 [Q, k].
        vectors: float32 [R, D], unit-length embeddings of the memory, for the similarity of two hits.
        num_neighbors: K, how many to keep.
        max_similarity: the bound, 0.9 in the papers with public CLIP weights; None for none.
        query_rows: int [Q], the memory row of the query's own document, or -1.
        query_keys: int64 [Q], the queries' fact keys, or `NO_KEY`.
        row_keys: int64 [R], the memory rows' fact keys, or `NO_KEY`.
        equal_codes: the bound on equal codes; None for none.

    Returns:
        Neighbors [Q, K], best first.
    """
    num_queries, num_hits = ids.shape
    bound = np.inf if max_similarity is None else max_similarity
    kept_ids = np.full((num_queries, num_neighbors), protocol.MISSING, np.int32)
    kept_scores = np.full((num_queries, num_neighbors), -np.inf, np.float32)
    kept_vectors = np.zeros((num_queries, num_neighbors, vectors.shape[1]), np.float32)
    num_kept = np.zeros(num_queries, np.int64)
    for rank in range(num_hits):
        if (num_kept == num_neighbors).all():
            break
        id_q = ids[:, rank]
        vector_qd = vectors[id_q]  # An arbitrary row where the hit is missing; it is not kept.
        key_q = row_keys[id_q]
        similarity_qk = np.einsum("qkd,qd->qk", kept_vectors, vector_qd)
        unfilled_qk = np.arange(num_neighbors)[None, :] >= num_kept[:, None]
        similarity_q = np.where(unfilled_qk, -np.inf, similarity_qk).max(axis=1, initial=-np.inf)
        keep = (
            (id_q != protocol.MISSING)
            & (id_q != query_rows)
            & ((key_q == NO_KEY) | (key_q != query_keys))
            & (scores[:, rank] <= bound)
            & (similarity_q <= bound)
            & (num_kept < num_neighbors)
        )
        queries = np.flatnonzero(keep)
        if equal_codes is not None:
            shares = _shares_codes(equal_codes.take(queries), id_q[queries], kept_ids[queries])
            queries = queries[~shares]
        slots = num_kept[queries]
        kept_ids[queries, slots] = id_q[queries]
        kept_scores[queries, slots] = scores[queries, rank]
        kept_vectors[queries, slots] = vector_qd[queries]
        num_kept[queries] += 1
    return protocol.Neighbors(kept_ids, kept_scores)


def _shares_codes(equal_codes: EqualCodes, id_q: np.ndarray, kept_qk: np.ndarray) -> np.ndarray:
    """Whether each row has too many codes of its query or of a kept row: bool [Q]."""
    codes_qn = equal_codes.read_rows(id_q)
    # An arbitrary row where nothing is kept yet.
    kept_share = equal_share(equal_codes.read_rows(kept_qk), codes_qn[:, None])
    share_q = np.where(kept_qk == protocol.MISSING, 0.0, kept_share).max(axis=1, initial=0.0)
    if equal_codes.queries is not None:
        share_q = np.maximum(share_q, equal_share(equal_codes.queries, codes_qn))
    return share_q > equal_codes.max_share


def find_neighbors(
    search: Callable[[np.ndarray, int], protocol.Neighbors],
    queries: np.ndarray,
    vectors: np.ndarray | MappedRows,
    *,
    num_neighbors: int,
    max_similarity: float | None,
    query_rows: np.ndarray,
    query_keys: np.ndarray,
    row_keys: np.ndarray,
    equal_codes: EqualCodes | None = None,
    counts: np.ndarray | None = None,
    num_candidates: int = 64,
    batch_size: int = 1024,
    on_progress: Callable[[int, int], None] | None = None,
) -> protocol.Neighbors:
    """Searches and selects for many queries, in batches; used to precompute the neighbors of a training set.

    Args:
        search: (queries float32 [q, D], k) -> Neighbors, as `Index.search`.
        queries: float32 [P, D], unit length.
        vectors, num_neighbors, max_similarity, query_rows, query_keys, row_keys, equal_codes: see `select`.
        counts: int [Q], the number of queries per document (see `interleave`); None for one each.
        num_candidates: number of hits per query from which neighbors are selected.
        batch_size: number of documents whose queries are searched at once.
        on_progress: called with (documents done, Q).

    Returns:
        Neighbors [Q, K], with missing neighbors if fewer than K candidates were accepted.
    """
    selected = [
        protocol.Neighbors(
            np.zeros((0, num_neighbors), np.int32), np.zeros((0, num_neighbors), np.float32)
        )
    ]
    counts = np.ones(len(queries), np.int64) if counts is None else counts
    ends = np.concatenate([[0], np.cumsum(counts)])
    for start in range(0, len(counts), batch_size):
        batch = slice(start, min(start + batch_size, len(counts)))
        batch_queries = queries[ends[batch.start] : ends[batch.stop]]
        hits = interleave(search(batch_queries, num_candidates), counts[batch])
        selected.append(
            select(
                hits.ids,
                hits.scores,
                vectors,
                num_neighbors=num_neighbors,
                max_similarity=max_similarity,
                query_rows=query_rows[batch],
                query_keys=query_keys[batch],
                row_keys=row_keys,
                equal_codes=equal_codes and equal_codes.take(batch),
            )
        )
        if on_progress is not None:
            on_progress(batch.stop, len(counts))
    return protocol.Neighbors(
        np.concatenate([neighbors.ids for neighbors in selected]),
        np.concatenate([neighbors.scores for neighbors in selected]),
    )
