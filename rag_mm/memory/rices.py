"""RICES: few-shot prompts with the memory's documents nearest to the query as examples.

Retrieval-based In-Context Example Selection (Yang et al. 2022, arXiv 2109.05014; named by Flamingo,
arXiv 2204.14198). Instead of random examples it uses those whose image, text or both are most similar to the
query, and places the most similar one next to the query.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.memory.index import protocol

Order = Literal["nearest_last", "nearest_first", "shuffled"]


def select_examples(
    search: Callable[[np.ndarray, int], protocol.Neighbors],
    queries: np.ndarray,
    num_examples: int,
    *,
    order: Order = "nearest_last",
    forbidden: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
) -> protocol.Neighbors:
    """Selects the examples of each query, in prompt order.

    Args:
        search: (queries float32 [q, D], k) -> Neighbors, as `memory.index(view).search`; the view says
            whether images, texts or both are compared.
        queries: float32 [Q, D], unit length.
        num_examples: K, the number of shots; 0 gives none.
        order: `nearest_last` puts the most similar example next to the query, as Flamingo does.
        forbidden: int [Q] or [Q, F], memory rows excluded for a query, such as its own; -1 for none.
        rng: for `shuffled`.

    Returns:
        Neighbors [Q, K]. If fewer than K documents remain, -1 fills the end far from the query: the front
        with `nearest_last`, else the back.

    Raises:
        UserError: K < 0, an unknown order, or `shuffled` without `rng`.
    """
    if num_examples < 0:
        raise UserError(f"{num_examples} examples are not possible; give 0 or more.")
    if order not in get_args(Order):
        raise UserError(f"There is no order {order!r}: choose {', '.join(get_args(Order))}.")
    if order == "shuffled" and rng is None:
        raise UserError("The order 'shuffled' needs a random generator.")
    if num_examples == 0:
        nothing = np.zeros((len(queries), 0), np.float32)
        return protocol.pad_hits(nothing, nothing, 0)
    if forbidden is None:
        forbidden = np.full((len(queries), 1), protocol.MISSING)
    forbidden = forbidden.reshape(len(queries), -1)
    hits = search(queries, num_examples + forbidden.shape[1])
    kept = _exclude(hits, forbidden, num_examples)
    if order == "nearest_last":
        return protocol.Neighbors(kept.ids[:, ::-1], kept.scores[:, ::-1])
    if order == "shuffled" and rng is not None:
        return _shuffled(kept, rng)
    return kept


def _exclude(hits: protocol.Neighbors, forbidden: np.ndarray, k: int) -> protocol.Neighbors:
    """The first k hits that are not forbidden, best first."""
    is_excluded = (hits.ids[:, :, None] == forbidden[:, None, :]).any(axis=2)
    is_excluded |= hits.ids == protocol.MISSING
    order = np.argsort(is_excluded, axis=1, kind="stable")[:, :k]
    is_missing = np.take_along_axis(is_excluded, order, axis=1)
    ids = np.where(is_missing, protocol.MISSING, np.take_along_axis(hits.ids, order, axis=1))
    scores = np.take_along_axis(hits.scores, order, axis=1)
    return protocol.Neighbors(
        ids.astype(np.int32), np.where(is_missing, -np.inf, scores).astype(np.float32)
    )


def _shuffled(kept: protocol.Neighbors, rng: np.random.Generator) -> protocol.Neighbors:
    sort_keys = rng.random(kept.ids.shape)
    sort_keys[kept.ids == protocol.MISSING] = np.inf
    order = np.argsort(sort_keys, axis=1, kind="stable")
    return protocol.Neighbors(
        np.take_along_axis(kept.ids, order, axis=1), np.take_along_axis(kept.scores, order, axis=1)
    )
