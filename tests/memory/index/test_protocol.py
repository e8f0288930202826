"""One suite for every index: what the protocol promises, and the checks at its boundary."""

import json

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.memory.index import device, exact, protocol, registry, scann

MAKERS = {
    "exact": exact.ExactIndex,
    "scann brute force": scann.ScannIndex,
    "scann hashed": lambda: scann.ScannIndex(scann.ScannConfig(scoring="hashed")),
    # Few rows in few leaves, all of them searched, so that nothing is approximate but the path.
    "scann tree": lambda: scann.ScannIndex(
        scann.ScannConfig(
            scoring="tree", num_leaves=5, leaves_to_search=5, reorder="float32", soar_lambda=1.5
        )
    ),
    "scann in three parts": lambda: scann.ScannIndex(
        scann.ScannConfig(scoring="hashed", max_rows=100)
    ),
    "device": device.DeviceIndex,
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def unit(rng: np.random.Generator, rows: int, dim: int = 16) -> np.ndarray:
    values = rng.normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def naive(queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ rows.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores, ids, axis=1)


def test_finds_what_numpy_finds(make):
    rng = np.random.default_rng(0)
    rows, queries = unit(rng, 300), unit(rng, 11)
    searcher = make()
    searcher.build(rows)
    found = searcher.search(queries, 5)
    ids, scores = naive(queries, rows, 5)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    assert found.ids.dtype == np.int32
    assert found.scores.dtype == np.float32
    assert searcher.num_rows == 300


def test_more_hits_than_rows_are_missing_not_row_0(make):
    rng = np.random.default_rng(1)
    rows, queries = unit(rng, 3), unit(rng, 2)
    searcher = make()
    searcher.build(rows)
    found = searcher.search(queries, 5)
    assert found.ids.shape == found.scores.shape == (2, 5)
    np.testing.assert_array_equal(found.ids[:, 3:], -1)
    np.testing.assert_array_equal(found.scores[:, 3:], -np.inf)
    np.testing.assert_array_equal(np.sort(found.ids[:, :3], axis=1), [[0, 1, 2]] * 2)


def test_no_rows_and_no_queries(make):
    rng = np.random.default_rng(2)
    searcher = make()
    searcher.build(np.zeros((0, 16), np.float32))
    found = searcher.search(unit(rng, 2), 3)
    np.testing.assert_array_equal(found.ids, np.full((2, 3), -1))
    searcher.build(unit(rng, 4))
    assert searcher.search(np.zeros((0, 16), np.float32), 3).ids.shape == (0, 3)


def test_added_rows_are_found_with_the_ids_after_the_last(make):
    rng = np.random.default_rng(3)
    rows = unit(rng, 60)
    grown, whole = make(), make()
    grown.add(rows[:40])
    grown.add(rows[40:])
    whole.build(rows)
    found, expected = grown.search(rows[50:], 3), whole.search(rows[50:], 3)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.ids[:, 0], np.arange(50, 60))


def test_removed_rows_are_not_found_and_the_ids_after_them_close_up(make):
    rng = np.random.default_rng(8)
    rows, queries = unit(rng, 120), unit(rng, 9)
    searcher = make()
    with pytest.raises(UserError, match="no rows yet"):
        searcher.remove(np.array([0]))
    searcher.build(rows)
    first = rng.permutation(120)[:50]
    searcher.remove(first)
    left = np.delete(rows, first, axis=0)
    searcher.remove(np.array([3, 3, 69]))
    left = np.delete(left, [3, 69], axis=0)
    for k in (1, 10, 68, 100):
        found = searcher.search(queries, k)
        ids, scores = naive(queries, left, k)
        np.testing.assert_array_equal(found.ids[:, :68], ids)
        np.testing.assert_allclose(found.scores[:, :68], scores, atol=1e-5)
        assert (found.ids[:, 68:] == -1).all()
    assert searcher.num_rows == 68
    with pytest.raises(UserError, match="Row 68 cannot be removed"):
        searcher.remove(np.array([68]))


def test_the_nearest_of_all_may_be_removed(make):
    """What is left is found even if every first hit of a search is gone."""
    rng = np.random.default_rng(9)
    rows, query = unit(rng, 250), unit(rng, 1)
    order = np.argsort(-(rows @ query[0]))
    searcher = make()
    searcher.build(rows)
    searcher.remove(order[:240])
    found = searcher.search(query, 4)
    expected = np.searchsorted(np.sort(order[240:]), order[240:244])
    np.testing.assert_array_equal(found.ids[0], expected)
    searcher.remove(np.arange(10))
    assert (searcher.search(query, 4).ids == -1).all()


def test_a_changed_index_adds_saves_and_loads_what_is_left(make, tmp_path):
    rng = np.random.default_rng(10)
    rows, queries = unit(rng, 90), unit(rng, 5)
    searcher, loaded = make(), make()
    searcher.build(rows[:60])
    searcher.remove(np.arange(0, 60, 2))
    searcher.add(rows[60:])
    left = np.concatenate([rows[1:60:2], rows[60:]])
    searcher.remove(np.array([0]))
    searcher.save(tmp_path / "index")
    loaded.load(tmp_path / "index", left[1:])
    for one in (searcher, loaded):
        np.testing.assert_array_equal(one.search(queries, 6).ids, naive(queries, left[1:], 6)[0])


def test_load_finds_what_the_saved_one_found(make, tmp_path):
    rng = np.random.default_rng(4)
    rows, queries = unit(rng, 200), unit(rng, 7)
    saved, loaded = make(), make()
    saved.build(rows)
    saved.save(tmp_path / "index")
    loaded.load(tmp_path / "index", rows)
    before, after = saved.search(queries, 4), loaded.search(queries, 4)
    np.testing.assert_array_equal(before.ids, after.ids)
    np.testing.assert_array_equal(before.scores, after.scores)
    loaded.add(queries)
    assert loaded.search(queries, 1).ids[0, 0] == 200


def test_load_refuses_other_rows_and_a_changed_description(make, tmp_path):
    rows = unit(np.random.default_rng(5), 50)
    searcher = make()
    searcher.build(rows)
    searcher.save(tmp_path)
    with pytest.raises(UserError, match="over 49 rows"):
        make().load(tmp_path, rows[:49])
    path = tmp_path / "index.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"kind": "other"}))
    with pytest.raises(UserError, match=r"index\.json"):
        make().load(tmp_path, rows)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"index\.json"):
        make().load(tmp_path, rows)
    path.unlink()
    with pytest.raises(UserError, match=r"index\.json"):
        make().load(tmp_path, rows)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused_by_number(make, bad):
    rows = unit(np.random.default_rng(6), 30)
    rows[[7, 9], 3] = bad
    searcher = make()
    with pytest.raises(UserError, match=r"Row 7 holds NaN, infinity or more than 1e\+06 \(2 of 30"):
        searcher.build(rows)
    searcher.build(rows[:7])
    with pytest.raises(UserError, match="Row 0 holds NaN"):
        searcher.add(rows[7:8])
    with pytest.raises(UserError, match="Query 1 holds NaN"):
        searcher.search(rows[6:8], 2)
    assert searcher.num_rows == 7


def test_wrong_widths_and_k_are_refused(make):
    rng = np.random.default_rng(7)
    searcher = make()
    with pytest.raises(UserError, match="no rows yet"):
        searcher.search(unit(rng, 1), 1)
    searcher.build(unit(rng, 30))
    with pytest.raises(UserError, match="8 wide but the index is 16 wide"):
        searcher.search(unit(rng, 2, 8), 1)
    with pytest.raises(UserError, match="8 wide but the index is 16 wide"):
        searcher.add(unit(rng, 2, 8))
    with pytest.raises(UserError, match=r"not of shape \[16\]"):
        searcher.search(unit(rng, 1)[0], 1)
    for k in (0, -3, protocol.MAX_HITS + 1, 10**12):
        with pytest.raises(UserError, match=f"k = {k} is not possible; give k from 1 to 1,000,000"):
            searcher.search(unit(rng, 1), k)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'faiss': choose scann, exact or device"):
        registry.make_index("faiss")
