"""RICES: the examples of a few-shot prompt are the memory's documents nearest to the query.

Retrieval-based In-Context Example Selection (Yang et al. 2022, arXiv 2109.05014; the name is
Flamingo's, arXiv 2204.14198): instead of examples drawn by lot, those whose image, text or both are most
similar, with the most similar next to the query.
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
    """The examples of each query, in the order in which a prompt shows them.

    Args:
        search: (queries float32 [q, D], k) -> Neighbors, as `memory.index(view).search`; the view says
            whether images, texts or both are compared.
        queries: float32 [Q, D] unit rows.
        num_examples: K, the shots; 0 gives none.
        order: `nearest_last` puts the most similar next to the query, as Flamingo does.
        forbidden: int [Q] or [Q, F], rows that a query must not see, such as its own; -1 for none.
        rng: for `shuffled`.

    Returns:
        Neighbors [Q, K]. Where the memory has fewer than K others, -1 fills the far end: the front of
        `nearest_last`, else the back.

    Raises:
        UserError: K < 0, an unknown order, or `shuffled` without `rng`.
    """
    if num_examples < 0:
        raise UserError(f"{num_examples} examples cannot be shown; ask for 0 or more.")
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
    found = search(queries, num_examples + forbidden.shape[1])
    kept = _without(found, forbidden, num_examples)
    if order == "nearest_last":
        return protocol.Neighbors(kept.ids[:, ::-1], kept.scores[:, ::-1])
    if order == "shuffled" and rng is not None:
        return _shuffled(kept, rng)
    return kept


def _without(found: protocol.Neighbors, forbidden: np.ndarray, k: int) -> protocol.Neighbors:
    """The first k hits that are not forbidden, best first."""
    bad = (found.ids[:, :, None] == forbidden[:, None, :]).any(axis=2)
    bad |= found.ids == protocol.MISSING
    places = np.argsort(bad, axis=1, kind="stable")[:, :k]
    is_missing = np.take_along_axis(bad, places, axis=1)
    ids = np.where(is_missing, protocol.MISSING, np.take_along_axis(found.ids, places, axis=1))
    scores = np.take_along_axis(found.scores, places, axis=1)
    return protocol.Neighbors(
        ids.astype(np.int32), np.where(is_missing, -np.inf, scores).astype(np.float32)
    )


def _shuffled(kept: protocol.Neighbors, rng: np.random.Generator) -> protocol.Neighbors:
    draws = rng.random(kept.ids.shape)
    draws[kept.ids == protocol.MISSING] = np.inf
    order = np.argsort(draws, axis=1, kind="stable")
    return protocol.Neighbors(
        np.take_along_axis(kept.ids, order, axis=1), np.take_along_axis(kept.scores, order, axis=1)
    )
