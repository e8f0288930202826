"""Examples for few-shot prompts: nearest ones, in an order that is asked for, never the query's own."""

import numpy as np
import pytest
from stand_in import StandInEncoder, make_documents

from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory, rices
from rag_mm.memory.index.exact import ExactIndex
from rag_mm.memory.writing import writer


@pytest.fixture(scope="module")
def searcher():
    rows = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    built = ExactIndex()
    built.build(rows)
    return built, rows


def test_nearest_examples_in_each_order(searcher):
    built, rows = searcher
    own = np.array([3, 17])
    ranked = np.argsort(-(rows[own] @ rows.T), axis=1)[:, 1:5]
    first = rices.select_examples(built.search, rows[own], 4, order="nearest_first", forbidden=own)
    np.testing.assert_array_equal(first.ids, ranked)
    last = rices.select_examples(built.search, rows[own], 4, forbidden=own)
    np.testing.assert_array_equal(last.ids, ranked[:, ::-1])
    assert (np.diff(last.scores, axis=1) >= 0).all()
    shuffled = rices.select_examples(
        built.search, rows[own], 4, order="shuffled", forbidden=own, rng=np.random.default_rng(0)
    )
    np.testing.assert_array_equal(np.sort(shuffled.ids), np.sort(ranked))
    assert (shuffled.ids != ranked).any()
    own_scores = np.einsum("qkd,qd->qk", rows[shuffled.ids], rows[own])
    np.testing.assert_allclose(shuffled.scores, own_scores, atol=1e-5)
    # Without a rule against it, the nearest is the query itself.
    assert rices.select_examples(built.search, rows[own], 1).ids[:, 0].tolist() == own.tolist()


def test_several_rows_may_be_forbidden_and_the_memory_may_be_small(searcher):
    built, rows = searcher
    twins = np.array([[3, 8, -1], [17, -1, -1]])
    found = rices.select_examples(built.search, rows[[3, 17]], 40, forbidden=twins)
    assert found.ids.shape == (2, 40)
    for ids, gone in zip(found.ids, twins, strict=True):
        present = ids[ids >= 0]
        assert set(present) == set(range(30)) - set(gone.tolist())
        assert (ids[: 40 - len(present)] == -1).all()
    assert rices.select_examples(built.search, rows[:2], 0).ids.shape == (2, 0)


def test_what_cannot_be_selected(searcher):
    built, rows = searcher
    with pytest.raises(UserError, match="-1 examples"):
        rices.select_examples(built.search, rows[:1], -1)
    with pytest.raises(UserError, match="no order 'best'"):
        rices.select_examples(built.search, rows[:1], 2, order="best")
    with pytest.raises(UserError, match="needs a random generator"):
        rices.select_examples(built.search, rows[:1], 2, order="shuffled")


@pytest.mark.parametrize("view", ["image", "text", "mixed"])
def test_the_view_says_what_is_compared(tmp_path, view):
    encoder = StandInEncoder()
    options = writer.Options(index="exact")
    built = retrieval_memory.Memory.build(
        tmp_path / "mem", make_documents(20), encoder, options=options
    )
    query = built.encode(document=built.document(4), view=view)
    found = rices.select_examples(
        built.index(view).search, query, 3, order="nearest_first", forbidden=np.array([4])
    )
    rows = built.embeddings(view)
    scores = rows @ rows[4]
    scores[4] = -np.inf
    np.testing.assert_array_equal(found.ids[0], np.argsort(-scores)[:3])
