"""Queries and selection: what a training example may see of the memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_mm.core.document_types import Document, Image, Text
from rag_mm.memory import policy
from rag_mm.memory.index import protocol

PICTURE = np.zeros((2, 2, 3), np.uint8)
DOCUMENT = Document("a", (Text("one two three four five"), Image(PICTURE)))


def test_a_query_is_one_modality():
    assert policy.make_query(DOCUMENT, "text") == DOCUMENT.text
    np.testing.assert_array_equal(policy.make_query(DOCUMENT, "image"), PICTURE)
    with pytest.raises(ValueError, match="no image"):
        policy.make_query(Document("b", (Text("a"),)), "image")
    with pytest.raises(ValueError, match="no text"):
        policy.make_query(Document("b", (Image(PICTURE),)), "text")


def test_dropout_takes_a_fifth_of_the_words_in_order_and_leaves_one():
    rng = np.random.default_rng(0)
    words = DOCUMENT.text.split()
    kept = []
    for _ in range(400):
        query = policy.make_query(DOCUMENT, "text", rng).split()
        kept.append(len(query))
        assert query == [word for word in words if word in query]
    assert 0.77 < np.mean(kept) / 5 < 0.83
    alone = policy.make_query(DOCUMENT, "text", rng, word_dropout=1.0)
    assert alone in words
    first, second = (
        policy.make_query(DOCUMENT, "text", np.random.default_rng((1, 2))) for _ in range(2)
    )
    assert first == second


def select(ids, scores, vectors, **changes):
    arguments = {
        "num_neighbors": 2,
        "max_similarity": 0.9,
        "query_rows": np.full(len(ids), -1),
        "query_keys": np.full(len(ids), policy.NO_KEY),
        "row_keys": np.full(len(vectors), policy.NO_KEY),
    } | changes
    return policy.select(np.int32(ids), np.float32(scores), vectors, **arguments)


def test_select_walks_down_and_skips():
    vectors = np.eye(6, dtype=np.float32)
    vectors[3] = vectors[1]  # A repeat of row 1.
    ids = [[0, 1, 3, 2, 4, -1]]
    scores = [[0.95, 0.8, 0.8, 0.5, 0.4, -np.inf]]
    found = select(ids, scores, vectors)
    np.testing.assert_array_equal(found.ids, [[1, 2]])  # 0 is too near, 3 repeats 1.
    np.testing.assert_allclose(found.scores, [[0.8, 0.5]])
    own = select(ids, scores, vectors, query_rows=np.array([1]))
    np.testing.assert_array_equal(own.ids, [[3, 2]])
    keys = np.array([-1, 7, -1, 7, 8, -1])
    twin = select(ids, scores, vectors, query_keys=np.array([7]), row_keys=keys)
    np.testing.assert_array_equal(twin.ids, [[2, 4]])
    few = select(ids, scores, vectors, num_neighbors=4)
    np.testing.assert_array_equal(few.ids, [[1, 2, 4, -1]])
    assert few.scores[0, 3] == -np.inf


def naive_select(ids, scores, vectors, k, bound, own, own_key, keys):
    kept = []
    for row, score in zip(ids, scores, strict=True):
        if len(kept) == k:
            break
        is_twin = row >= 0 and keys[row] != policy.NO_KEY and keys[row] == own_key
        if row < 0 or row == own or is_twin or score > bound:
            continue
        if all(np.float32(vectors[other] @ vectors[row]) <= bound for other in kept):
            kept.append(row)
    return kept + [-1] * (k - len(kept))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_all_queries_at_once_equal_one_by_one(seed, k):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (8, 3)).astype(np.float32) / 4  # Exact sums: no rounding.
    queries = rng.integers(-2, 3, (5, 3)).astype(np.float32) / 4
    scores = queries @ vectors.T
    ids = np.argsort(-scores, axis=1).astype(np.int32)
    scores = np.take_along_axis(scores, ids, axis=1)
    ids[rng.random(ids.shape) < 0.1] = -1
    own, keys = rng.integers(-1, 8, 5), rng.integers(-1, 3, 8)
    query_keys = rng.integers(-1, 3, 5)
    found = select(
        ids, scores, vectors, num_neighbors=k, max_similarity=0.25,
        query_rows=own, query_keys=query_keys, row_keys=keys,
    )  # fmt: skip
    expected = [
        naive_select(ids[q], scores[q], vectors, k, 0.25, own[q], query_keys[q], keys)
        for q in range(5)
    ]
    np.testing.assert_array_equal(found.ids, np.array(expected, np.int32).reshape(5, k))


def searcher(vectors):
    def search(queries, k):
        scores = queries @ vectors.T
        ids = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
        return protocol.Neighbors(ids, np.take_along_axis(scores, ids, axis=1))

    return search


def test_find_neighbors_does_not_depend_on_the_batches():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def find(batch_size):
        return policy.find_neighbors(
            searcher(vectors),
            vectors[:20],
            vectors,
            num_neighbors=2,
            max_similarity=0.95,
            query_rows=np.arange(20),
            query_keys=np.full(20, policy.NO_KEY),
            row_keys=np.full(50, policy.NO_KEY),
            num_candidates=10,
            batch_size=batch_size,
            on_progress=lambda done, total: calls.append((done, total)),
        )

    calls = []
    whole = find(100)
    assert calls == [(20, 20)]
    parts = find(7)
    assert calls[1:] == [(7, 20), (14, 20), (20, 20)]
    np.testing.assert_array_equal(whole.ids, parts.ids)
    assert (whole.ids != np.arange(20)[:, None]).all()
    assert (whole.ids >= 0).all()


def test_texts_are_asked_phrase_by_phrase():
    texts = ["a cat and a dog on red", "a cow", " and "]
    parts, counts = policy.split_queries(texts, split_phrases=True)
    assert parts == ["a cat", "a dog on red", "a cow", " and "] and counts.tolist() == [2, 1, 1]
    parts, counts = policy.split_queries(texts, split_phrases=False)
    assert parts == texts and counts.tolist() == [1, 1, 1]


def test_hits_of_phrases_take_turns_and_none_comes_twice():
    ids = np.int32([[5, 3, 1], [7, 5, -1], [2, 4, 6]])
    scores = np.float32([[0.5, 0.4, 0.1], [0.9, 0.3, -np.inf], [0.8, 0.7, 0.6]])
    found = policy.interleave(protocol.Neighbors(ids, scores), np.array([2, 1]))
    first = [i for i in found.ids[0] if i != protocol.MISSING]
    assert first == [7, 5, 3, 1]
    assert [i for i in found.ids[1] if i != protocol.MISSING] == [2, 4, 6]
    alone = policy.interleave(protocol.Neighbors(ids, scores), np.array([1, 1, 1]))
    np.testing.assert_array_equal(alone.ids, ids)


def test_a_document_that_asks_twice_gets_one_of_each():
    vectors = np.eye(4, dtype=np.float32)
    near = np.float32([[1, 0.5, 0, 0], [0, 0, 0.5, 1], [0, 1, 0, 0]])

    def find(batch_size):
        return policy.find_neighbors(
            searcher(vectors),
            near,
            vectors,
            num_neighbors=2,
            max_similarity=2.0,
            query_rows=np.array([-1, -1]),
            query_keys=np.full(2, policy.NO_KEY),
            row_keys=np.full(4, policy.NO_KEY),
            counts=np.array([2, 1]),
            num_candidates=4,
            batch_size=batch_size,
        ).ids

    assert set(find(8)[0]) == {0, 3} and find(8)[1, 0] == 1
    np.testing.assert_array_equal(find(8), find(1))


def find_by_codes(codes, max_share, query_codes=None, k=3):
    """Neighbors of one query, whose hits are rows 0, 1, 2, ... of a memory with these codes."""
    vectors = np.eye(len(codes), dtype=np.float32)
    return policy.find_neighbors(
        searcher(vectors),
        np.linspace(1, 0.5, len(codes), dtype=np.float32)[None],
        vectors,
        num_neighbors=k,
        query_rows=np.array([-1]),
        query_keys=np.array([policy.NO_KEY]),
        row_keys=np.full(len(codes), policy.NO_KEY),
        **policy.Rules(max_equal_codes=max_share).bounds(codes.__getitem__, query_codes),
    ).ids[0]


def test_a_hit_with_too_many_codes_of_a_chosen_one_or_of_the_query_is_redundant():
    codes = np.array([[1, 2, 3, 4], [1, 2, 3, 9], [1, 2, 8, 8], [4, 3, 2, 1], [7, 7, 7, 7]])
    # Row 1 has three quarters of row 0's codes, row 2 half; row 3 has all of them, elsewhere.
    assert find_by_codes(codes, 0.5).tolist() == [0, 2, 3]
    assert find_by_codes(codes, 0.49).tolist() == [0, 3, 4]
    assert find_by_codes(codes, 1.0).tolist() == [0, 1, 2]
    query = np.array([[5, 5, 2, 1]])
    assert find_by_codes(codes, 0.49, query).tolist() == [0, 4, protocol.MISSING]
    # Rows without an image equal nothing, not even each other.
    assert find_by_codes(np.full((3, 4), -1), 0.0).tolist() == [0, 1, 2]


def test_twin_keys_are_stable_and_never_no_key():
    assert policy.fact_key("a") == policy.fact_key("a") != policy.fact_key("b")
    keys = np.array([policy.fact_key(str(i)) for i in range(1000)], np.int64)
    assert (keys >= 0).all()
    assert len(set(keys.tolist())) == 1000
