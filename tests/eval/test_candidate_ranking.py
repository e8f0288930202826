"""Ranks, and what VisDial computes from them."""

import numpy as np
import pytest

from rag_mm.eval import candidate_ranking


def test_the_highest_score_has_rank_1_and_of_equal_ones_the_earlier():
    assert candidate_ranking.ranks(np.array([0.1, 3, -1, 3])).tolist() == [3, 1, 4, 2]


def test_figures_of_a_rank():
    found = candidate_ranking.figures(4)
    assert found == {"mrr": 0.25, "rank": 4, "recall_1": 0, "recall_5": 1, "recall_10": 1}


def test_ndcg_counts_as_many_candidates_as_are_relevant():
    relevance = [0.0, 1.0, 0.5, 0.0]
    assert candidate_ranking.ndcg(np.array([1, 4, 3, 2]), relevance) == pytest.approx(1)
    # Second and third are swapped with one that is not relevant: only the first place is filled.
    discount = 1 / np.log2(3)
    found = candidate_ranking.ndcg(np.array([3, 4, 1, 2]), relevance)
    assert found == pytest.approx(1 / (1 + 0.5 * discount))
    assert candidate_ranking.ndcg(np.array([1, 2]), [0, 0]) is None
