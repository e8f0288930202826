"""Which documents a model gets to see: queries and selection (RA-CM3 section 3.1; ra_cm3.md 4)."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from rag_mm.core import document_types, files
from rag_mm.memory.index import protocol

NO_KEY = -1
"""The twin key of a row or query whose facts are unknown: it has no twin."""


def make_query(
    document: document_types.Document,
    modality: Literal["text", "image"],
    rng: np.random.Generator | None = None,
    token_dropout: float = 0.2,
) -> str | np.ndarray:
    """One modality of a document, as a query: training never shows the retriever the whole target.

    Args:
        document: the main document.
        modality: which part to ask with.
        rng: drops each word of a text with probability `token_dropout`, keeping one at least;
            None drops nothing (inference). Dropout of an image is undefined and not done.
        token_dropout: the probability.

    Returns:
        A text, or the image's uint8 [H, W, 3].

    Raises:
        ValueError: the document has no such part.
    """
    if modality == "image":
        if document.image is None:
            raise ValueError(f"document {document.id!r} has no image to ask with")
        return document.image
    words = document.text.split()
    if not words:
        raise ValueError(f"document {document.id!r} has no text to ask with")
    if rng is None:
        return document.text
    draws = rng.random(len(words))
    kept = [word for word, draw in zip(words, draws, strict=True) if draw >= token_dropout]
    return " ".join(kept) if kept else words[int(draws.argmax())]


def split_queries(texts: Sequence[str], split_phrases: bool) -> tuple[list[str], np.ndarray]:
    """What to ask the retriever for each text, and how many queries in a row are one text's, int64 [Q].

    One embedding seldom holds two entities; `split_phrases` asks for what `and` joins one after the other, and so
    for both halves of a name like `bow and arrow`, which it cannot tell from two.
    """
    each = [
        (split_phrases and [part for part in text.split(" and ") if part.strip()]) or [text]
        for text in texts
    ]
    counts = np.array([len(parts) for parts in each], np.int64)
    return [part for parts in each for part in parts], counts


def interleave(hits: protocol.Neighbors, counts: np.ndarray) -> protocol.Neighbors:
    """The hits of several queries of one document as one list: the best of each, by score, then the second.

    Args:
        hits: [P, k], best first.
        counts: int [Q], how many queries in a row belong together; they add up to P.

    Returns:
        Neighbors [Q, k max(counts)], best first only among hits of one rank; a row that several queries found
        is missing after its first place.
    """
    num_hits, most = hits.ids.shape[1], int(counts.max(initial=1))
    if most == 1:
        return hits
    owner = np.repeat(np.arange(len(counts)), counts)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.full((len(counts), num_hits, most), protocol.MISSING, np.int32)
    scores = np.full(ids.shape, -np.inf, np.float32)
    ids[owner, :, part], scores[owner, :, part] = hits.ids, hits.scores
    order = np.argsort(-scores, axis=2, kind="stable")
    flat_ids = np.take_along_axis(ids, order, axis=2).reshape(len(counts), -1)
    flat_scores = np.take_along_axis(scores, order, axis=2).reshape(len(counts), -1)
    by_id = np.argsort(flat_ids, axis=1, kind="stable")
    is_repeat = np.diff(np.take_along_axis(flat_ids, by_id, axis=1), axis=1, prepend=-2) == 0
    repeats = np.zeros_like(is_repeat)
    np.put_along_axis(repeats, by_id, is_repeat, axis=1)
    flat_ids = np.where(repeats, np.int32(protocol.MISSING), flat_ids)
    return protocol.Neighbors(flat_ids, np.where(repeats, np.float32(-np.inf), flat_scores))


def twin_key(facts: str) -> int:
    """A number in [0, 2^63) for what a document shows: equal facts are twins, whatever the id."""
    return int(files.digest(facts.encode())[:16], 16) >> 1


def select(
    ids: np.ndarray,
    scores: np.ndarray,
    vectors: np.ndarray,
    *,
    num_neighbors: int,
    max_similarity: float,
    own_rows: np.ndarray,
    own_keys: np.ndarray,
    row_keys: np.ndarray,
) -> protocol.Neighbors:
    """Walks down each query's ranked hits and keeps the first that are neither it nor repeats.

    Skipped are missing hits, the query's own row, rows with its twin key, and rows more similar
    than `max_similarity` to the query (their score) or to a row kept already.

    Args:
        ids: int32 [Q, k] hits, best first, -1 where missing.
        scores: float32 [Q, k].
        vectors: float32 [R, D] unit rows of the memory, for the similarity of two hits.
        num_neighbors: K, how many to keep.
        max_similarity: the bound, 0.9 for CLIP weights; calibrated for a small retriever.
        own_rows: int [Q], the row that is the query's own document, or -1.
        own_keys: int64 [Q], the query's twin key, or `NO_KEY`.
        row_keys: int64 [R], the rows' twin keys, or `NO_KEY`.

    Returns:
        Neighbors [Q, K], best first.
    """
    num_queries, num_hits = ids.shape
    kept_ids = np.full((num_queries, num_neighbors), protocol.MISSING, np.int32)
    kept_scores = np.full((num_queries, num_neighbors), -np.inf, np.float32)
    kept_vectors = np.zeros((num_queries, num_neighbors, vectors.shape[1]), np.float32)
    num_kept = np.zeros(num_queries, np.int64)
    for rank in range(num_hits):
        if (num_kept == num_neighbors).all():
            break
        id_q = ids[:, rank]
        vector_qd = vectors[id_q]  # Where the hit is missing this is some row, which is not kept.
        key_q = row_keys[id_q]
        similarity_qk = np.einsum("qkd,qd->qk", kept_vectors, vector_qd)
        unfilled_qk = np.arange(num_neighbors)[None, :] >= num_kept[:, None]
        similarity_q = np.where(unfilled_qk, -np.inf, similarity_qk).max(axis=1, initial=-np.inf)
        keep = (
            (id_q != protocol.MISSING)
            & (id_q != own_rows)
            & ((key_q == NO_KEY) | (key_q != own_keys))
            & (scores[:, rank] <= max_similarity)
            & (similarity_q <= max_similarity)
            & (num_kept < num_neighbors)
        )
        queries = np.flatnonzero(keep)
        places = num_kept[queries]
        kept_ids[queries, places] = id_q[queries]
        kept_scores[queries, places] = scores[queries, rank]
        kept_vectors[queries, places] = vector_qd[queries]
        num_kept[queries] += 1
    return protocol.Neighbors(kept_ids, kept_scores)


def find_neighbors(
    search: Callable[[np.ndarray, int], protocol.Neighbors],
    queries: np.ndarray,
    vectors: np.ndarray,
    *,
    num_neighbors: int,
    max_similarity: float,
    own_rows: np.ndarray,
    own_keys: np.ndarray,
    row_keys: np.ndarray,
    counts: np.ndarray | None = None,
    num_candidates: int = 64,
    batch_size: int = 1024,
    on_progress: Callable[[int, int], None] | None = None,
) -> protocol.Neighbors:
    """Searches and selects for many queries: what training reads is computed before it starts.

    Args:
        search: (queries float32 [q, D], k) -> Neighbors, as `Index.search`.
        queries: float32 [P, D] unit rows.
        vectors, num_neighbors, max_similarity, own_rows, own_keys, row_keys: see `select`.
        counts: int [Q], how many of the queries each document asks, see `interleave`; None for one each.
        num_candidates: how far down each query's ranked list selection walks.
        batch_size: documents whose queries are searched at once.
        on_progress: called with (documents done, Q).

    Returns:
        Neighbors [Q, K]; a query whose candidates were all skipped has missing ones.
    """
    found = [
        protocol.Neighbors(
            np.zeros((0, num_neighbors), np.int32), np.zeros((0, num_neighbors), np.float32)
        )
    ]
    counts = np.ones(len(queries), np.int64) if counts is None else counts
    ends = np.concatenate([[0], np.cumsum(counts)])
    for start in range(0, len(counts), batch_size):
        batch = slice(start, min(start + batch_size, len(counts)))
        asked = queries[ends[batch.start] : ends[batch.stop]]
        hits = interleave(search(asked, num_candidates), counts[batch])
        found.append(
            select(
                hits.ids,
                hits.scores,
                vectors,
                num_neighbors=num_neighbors,
                max_similarity=max_similarity,
                own_rows=own_rows[batch],
                own_keys=own_keys[batch],
                row_keys=row_keys,
            )
        )
        if on_progress is not None:
            on_progress(batch.stop, len(counts))
    return protocol.Neighbors(
        np.concatenate([neighbors.ids for neighbors in found]),
        np.concatenate([neighbors.scores for neighbors in found]),
    )


def calibrate_max_similarity(
    vectors: np.ndarray,
    class_ids: np.ndarray,
    fact_keys: np.ndarray,
    percentile: float = 99.0,
) -> float:
    """The similarity below which `percentile` % of pairs of one class with other facts lie.

    A small retriever packs its space tightly: the papers' 0.9 would forbid exactly the right
    documents. This bound still forbids copies, and of good documents only the last percent.

    Args:
        vectors: float32 [R, D] unit rows.
        class_ids: int [R], what each row shows.
        fact_keys: int64 [R], equal for twins.
        percentile: in [0, 100].

    Raises:
        ValueError: no two rows share a class and differ in facts.
    """
    similarities = []
    order = np.argsort(class_ids, kind="stable")
    starts = np.flatnonzero(np.diff(class_ids[order], prepend=class_ids[order][:1] - 1))
    for rows in np.split(order, starts[1:]):
        first, second = np.triu_indices(len(rows), k=1)
        differ = fact_keys[rows[first]] != fact_keys[rows[second]]
        similarity = (vectors[rows] @ vectors[rows].T)[first, second]
        similarities.append(similarity[differ])
    values = np.concatenate(similarities) if similarities else np.zeros(0)
    if not values.size:
        raise ValueError("no two rows share a class and differ in facts: nothing to calibrate on")
    return float(np.percentile(values, percentile))
