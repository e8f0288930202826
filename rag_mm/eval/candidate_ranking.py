"""Ranks of given answers by their scores, and what is computed from them (Das et al. 2017, VisDial)."""

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)


def ranks(scores: np.ndarray) -> np.ndarray:
    """The rank of each candidate, int64 [C] from 1, the highest score first; of equal ones the earlier."""
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    found = np.empty(len(order), np.int64)
    found[order] = np.arange(1, len(order) + 1)
    return found


def figures(rank: int) -> dict[str, float]:
    """Of the right candidate's rank: `mrr`, its reciprocal; `rank`; and whether it is among the first few."""
    return {"mrr": 1 / rank, "rank": float(rank)} | {
        f"recall_{count}": float(rank <= count) for count in RECALLS
    }


def ndcg(scores: np.ndarray, relevance: Sequence[float]) -> float | None:
    """Normalized discounted cumulative gain among the first K, K the number of relevant candidates.

    Args:
        scores: float [C].
        relevance: of each candidate, at least 0.

    Returns:
        0..1; None where no candidate is relevant.
    """
    given = np.asarray(relevance, np.float64)
    count = int((given > 0).sum())
    if not count:
        return None
    discounts = 1 / np.log2(np.arange(count) + 2)
    found = given[np.argsort(-np.asarray(scores, np.float64), kind="stable")][:count]
    best = np.sort(given)[::-1][:count]
    return float((found * discounts).sum() / (best * discounts).sum())
