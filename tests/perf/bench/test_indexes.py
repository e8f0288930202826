"""The benchmark's own parts: rows that are what they are said to be, ratios that point the right way."""

import importlib.util
import json
import mmap

import numpy as np
import pytest

from rag_mm.cli import main
from rag_mm.perf.bench import indexes, timing
from rag_mm.perf.bench.vectors import Cones


def test_rows_and_queries_lie_in_two_cones():
    cones = Cones(dim=64, num_clusters=50)
    rows, queries = cones.rows(3_000), cones.queries(500)
    for values in (rows, queries):
        np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
    means = [
        values.mean(axis=0) / np.linalg.norm(values.mean(axis=0)) for values in (rows, queries)
    ]
    own = [
        float((values @ mean).mean()) for values, mean in zip((rows, queries), means, strict=True)
    ]
    across = float((queries @ means[0]).mean())
    assert min(own) > 0.5 and across < 0.3  # Narrow cones, apart from each other.
    np.testing.assert_array_equal(cones.rows(200), rows[:200])
    assert np.abs(Cones(dim=64, num_clusters=50, seed=1).rows(10) - rows[:10]).max() > 0.1
    # Queries ask for something: the best row is far better than a random one.
    scores = queries @ rows.T
    assert (scores.max(axis=1) - scores.mean(axis=1)).mean() > 3 * scores.std(axis=1).mean()


def test_true_neighbors_are_those_of_one_search_whatever_the_blocks():
    cones = Cones(dim=16, num_clusters=20)
    rows, queries = cones.rows(700), cones.queries(9)
    expected = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :10]
    for block in (5, 256, 1_000):
        np.testing.assert_array_equal(indexes.true_neighbors(rows, queries, 10, block), expected)


def test_times_are_taken_by_turns():
    order = []
    seconds = timing.alternate([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == ["a", "b"] * 4
    assert len(seconds) == 2 and min(seconds) >= 0


def test_resident_memory_shows_what_is_held():
    timing.reset_peak_memory()
    before = timing.resident_memory(peak=False)
    # Pages of its own: an array may lie in memory that the process had freed but still holds.
    with mmap.mmap(-1, 50_000_000) as held:
        held.write(b"1" * len(held))
        assert timing.resident_memory(peak=True) - before > 40_000_000


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "WHAT"),
        (["memory", "--rows=3"], "--rows is 3"),
        (["memory", "--dim=9"], "--dim must be even"),
    ],
)
def test_mistakes(capsys, words, complaint):
    assert main.main(["bench", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_without_the_peer_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert main.main(["bench", "memory"]) == 2
    assert "[bench]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs the extra [bench]")
def test_every_case_has_both_sides(capsys):
    argv = ["bench", "memory", "--rows=22000", "--dim=32", "--rounds=1", "--hnsw", "--json"]
    assert main.main(argv) == 0
    cases = json.loads(capsys.readouterr().out)
    kinds = {"batch_256", "batch_1", "build", "bytes", "memory"}
    expected = {f"{peer}_{kind}" for peer in ("ivf", "hnsw") for kind in kinds}
    assert set(cases) == expected | {"exact", "wrapper", "device"}
    for case in cases.values():
        assert {"ours", "peer", "ratio", "machine", "versions"} <= set(case)
        assert case["ratio"] > 0
    assert cases["ivf_batch_256"]["our_recall"] >= 0.95
    assert cases["ivf_batch_256"]["peer_recall"] >= 0.95
    speed, size = cases["ivf_batch_256"], cases["ivf_bytes"]
    assert speed["ratio"] == pytest.approx(speed["ours"] / speed["peer"])
    assert size["ratio"] == pytest.approx(size["peer"] / size["ours"])
    assert cases["device"]["our_recall"] > 0.999
