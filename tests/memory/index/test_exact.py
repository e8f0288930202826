"""The oracle: chunks and buckets change nothing, ties go to the smaller id."""

import numpy as np
import pytest

from rag_mm.memory.index import exact


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(exact, "_ROWS_PER_CHUNK", 64)
    monkeypatch.setattr(exact, "_ROWS_PER_BLOCK", 16)
    monkeypatch.setattr(exact, "_MAX_QUERIES", 32)


@pytest.mark.usefixtures("small_chunks")
def test_many_chunks_equal_one():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(301, 12)).astype(np.float32)
    queries = rng.normal(size=(70, 12)).astype(np.float32)
    searcher = exact.ExactIndex()
    searcher.build(rows)
    for k in (1, 5, 100, 301, 310):  # Also more than a chunk holds.
        found = searcher.search(queries, k)
        scores = queries @ rows.T
        ids = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, 301)]
        np.testing.assert_allclose(
            found.scores[:, :301], np.take_along_axis(scores, ids, axis=1), atol=1e-4
        )
        assert (found.ids[:, :301] == ids).mean() > 0.99


@pytest.mark.usefixtures("small_chunks")
def test_equal_scores_go_to_the_smaller_id():
    rows = np.ones((200, 4), np.float32)
    searcher = exact.ExactIndex()
    searcher.build(rows)
    np.testing.assert_array_equal(searcher.search(rows[:2], 90).ids, [np.arange(90)] * 2)


def test_negative_scores_beat_the_padding():
    rows = -np.ones((3, 4), np.float32)
    searcher = exact.ExactIndex()
    searcher.build(rows)
    found = searcher.search(np.ones((1, 4), np.float32), 3)
    np.testing.assert_array_equal(found.ids, [[0, 1, 2]])
    np.testing.assert_array_equal(found.scores, [[-4, -4, -4]])


def test_one_program_serves_batches_of_a_bucket():
    rng = np.random.default_rng(1)
    searcher = exact.ExactIndex()
    searcher.build(rng.normal(size=(100, 6)).astype(np.float32))
    queries = rng.normal(size=(8, 6)).astype(np.float32)
    searcher.search(queries, 3)
    compiled = exact._top_k._cache_size()
    for count in range(1, 9):
        alone = searcher.search(queries[:count], 3)
        np.testing.assert_array_equal(alone.ids, searcher.search(queries, 3).ids[:count])
    searcher.build(rng.normal(size=(130, 6)).astype(np.float32))
    searcher.search(queries, 3)
    assert exact._top_k._cache_size() == compiled
