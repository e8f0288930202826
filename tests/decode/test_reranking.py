"""Re-ranking keeps each example's best candidate; kinds of candidates take turns."""

import numpy as np

from rag_mm.decode import reranking, tasks

SCORES = np.array([[0.1, 0.9], [0.7, 0.2], [0.3, 0.8]])  # [candidates, examples]


def test_best_of_keeps_the_best_candidate_of_each_example():
    calls = []

    def generate(seeds):
        calls.append(seeds)
        return np.full((2, 4), len(calls), np.int32)

    score = lambda codes: SCORES[codes[:, 0] - 1, [0, 1]]
    drawn = reranking.best_of(generate, score, num_examples=2, num_candidates=3, seed=7)
    assert drawn.best[:, 0].tolist() == [2, 1]
    assert drawn.items[:, :, 0].tolist() == [[1, 1], [2, 2], [3, 3]]
    np.testing.assert_array_equal(drawn.scores, SCORES)
    assert len(np.unique(np.concatenate(calls))) == 6
    np.testing.assert_array_equal(calls[0], tasks.make_seeds(7, 2))


def test_two_kinds_make_half_of_the_candidates_each_from_the_seeds_of_one():
    kinds = [lambda seeds, kind=kind: np.stack([seeds, np.full(3, kind)], 1) for kind in (1, 2)]
    drawn = reranking.best_of(kinds, lambda items: items[:, 1], 3, num_candidates=4, seed=0)
    assert drawn.items[:, 0, 1].tolist() == [1, 2, 1, 2]
    assert drawn.best[:, 1].tolist() == [2, 2, 2]
    alone = reranking.best_of(kinds[0], lambda items: items[:, 1], 3, num_candidates=4, seed=0)
    np.testing.assert_array_equal(drawn.items[..., 0], alone.items[..., 0])


def test_a_single_candidate_is_not_scored():
    drawn = reranking.best_of(lambda seeds: seeds[:, None], lambda codes: 1 / 0, 3, 1, seed=0)
    assert drawn.best.shape == (3, 1) and drawn.scores is None
