"""Hazards of ScaNN that would give wrong results or end the process, and the guard against each."""

import json
import os
import pathlib
import pickle
import shutil

import fresh_python
import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.memory.index import exact, own_indexes, registry, scann, scann_searcher

HASHED = scann.ScannConfig(scoring="hashed")
PROGRAMS = pathlib.Path(__file__).parent / "programs"


def unit(rng: np.random.Generator, rows: int, dim: int = 64) -> np.ndarray:
    values = rng.normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def large():
    rng = np.random.default_rng(0)
    rows, queries = unit(rng, 20_000), unit(rng, 200)
    oracle = exact.ExactIndex()
    oracle.build(rows)
    return rows, queries, oracle


def test_hashed_recall_at_10_against_exact(large):
    rows, queries, oracle = large
    searcher = scann.ScannIndex(HASHED)
    searcher.build(rows)
    found, right = searcher.search(queries, 10), oracle.search(queries, 10)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(found.ids, right.ids, strict=True)])
    assert recall >= 0.95


def test_hashing_begins_at_the_stated_size(large):
    rows, _, _ = large
    searcher = scann.ScannIndex()
    searcher.build(rows[:19_999])
    assert searcher.scoring() == "brute_force"
    searcher.build(rows)
    assert searcher.scoring() == "hashed"


def test_k_above_the_reorder_size_is_not_cut(large):
    rows, queries, oracle = large
    searcher = scann.ScannIndex(scann.ScannConfig("hashed", num_reordered=20))
    searcher.build(rows)
    found, right = searcher.search(queries, 500), oracle.search(queries, 500)
    assert (found.ids >= 0).all()
    # Exact scores, so all 500 were reordered and none kept its hashed one.
    own = np.einsum("qkd,qd->qk", rows[found.ids], queries)
    np.testing.assert_allclose(found.scores, own, atol=1e-5)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(found.ids, right.ids, strict=True)])
    assert recall > 0.8


def test_saved_hashed_files_are_checked_before_native_code_reads_them(tmp_path):
    rows = unit(np.random.default_rng(1), 400, 16)
    searcher = scann.ScannIndex(HASHED)
    searcher.build(rows)
    searcher.save(tmp_path)
    names = sorted(set(os.listdir(tmp_path)) - {"index.json"})
    assert names == ["ah_codebook.pb", "dataset.npy", "hashed_dataset.npy", "scann_config.pb"]
    for name in names:
        path = tmp_path / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} was changed"):
            scann.ScannIndex().load(tmp_path, rows)
        path.unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            scann.ScannIndex().load(tmp_path, rows)
        path.write_bytes(data)
    scann.ScannIndex().load(tmp_path, rows)


def test_two_trees_share_the_rows(tmp_path, large):
    rows, queries, oracle = large
    tree = scann.ScannConfig("tree", num_leaves=4, leaves_to_search=4, num_trees=2)
    searcher, loaded = scann.ScannIndex(tree), scann.ScannIndex()
    searcher.build(rows)
    searcher.save(tmp_path)
    assert len(json.loads((tmp_path / "index.json").read_text())["files"]) == 2
    loaded.load(tmp_path, rows)
    assert loaded.scoring() == "tree"
    found, right = loaded.search(queries, 10), oracle.search(queries, 10)
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(found.ids, right.ids, strict=True)])
    assert recall > 0.9


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_a_file_of_pickled_ids_is_refused_and_never_loaded(tmp_path):
    rows = unit(np.random.default_rng(2), 400, 16)
    searcher = scann.ScannIndex(HASHED)
    searcher.build(rows)
    searcher.save(tmp_path)
    (tmp_path / "scann_docids.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"scann_docids\.pkl is not a file of a scann index"):
        scann.ScannIndex().load(tmp_path, rows)


def hostile(directory, path, value):
    """Puts a value into an index's description, of which everything else stays as it was."""
    saved = json.loads((directory / "index.json").read_text())
    inner = saved
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (directory / "index.json").write_text(json.dumps(saved))


FOREIGN = {
    "settings": (("config", "num_reordered"), "9 } evil {"),
    "a huge setting": (("config", "dims_per_block"), 1 << 60),
    "no settings": (("config",), None),
    "another file": (("files", 0, "hashed_dataset.npy"), "0" * 64),
    "another width": (("dim",), 17),
    "more searchers": (("files",), [{}] * 1000),
    "no files": (("files",), None),
}


@pytest.mark.parametrize(("path", "value"), FOREIGN.values(), ids=FOREIGN)
def test_an_index_of_somebody_else_is_built_from_its_rows(tmp_path, monkeypatch, path, value):
    rows = unit(np.random.default_rng(3), 400, 16)
    searcher = scann.ScannIndex(HASHED)
    searcher.build(rows)
    searcher.save(tmp_path)
    hostile(tmp_path, path, value)

    def refuse(*args):
        raise AssertionError("native code read a stranger's file")

    monkeypatch.setattr(scann_searcher.Searcher, "load", refuse)
    loaded = scann.ScannIndex()
    loaded.load(tmp_path, rows)
    assert loaded.scoring() == "brute_force"  # the default at this size
    np.testing.assert_array_equal(loaded.search(rows[:9], 1).ids[:, 0], np.arange(9))
    assert registry.saved_scann("scann", tmp_path) is None


def test_an_own_index_is_loaded_and_elsewhere_it_is_not_ones_own(tmp_path, monkeypatch, capsys):
    rows = unit(np.random.default_rng(3), 400, 16)
    searcher = scann.ScannIndex(HASHED)
    searcher.build(rows)
    searcher.save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # A moved or copied memory stays one's own.
    for folder in ("a", "b"):
        loaded = scann.ScannIndex()
        loaded.load(tmp_path / folder, rows)
        assert loaded.scoring() == "hashed" and own_indexes.is_own(tmp_path / folder / "index.json")
    assert registry.saved_scann("scann", tmp_path / "a") == HASHED
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded.load(tmp_path / "a", rows)
    assert loaded.scoring() == "brute_force"
    assert "memory compact writes a version with one of your own" in capsys.readouterr().err
    searcher.save(tmp_path / "c")
    assert own_indexes.is_own(tmp_path / "c" / "index.json")


@pytest.mark.parametrize("value", [3e38, 1e30, -1e7, np.inf, np.nan])
def test_rows_that_overflow_native_code_are_refused(value):
    rows = unit(np.random.default_rng(3), 400, 16)
    rows[7, 3] = value
    with pytest.raises(
        UserError, match=r"Row 7 holds NaN, infinity or more than 1e\+06 \(1 of 400"
    ):
        scann.ScannIndex(HASHED).build(rows)


RAISING = "raise ImportError('a TensorFlow of another release')"
NOTHING = "version = 'none'"


@pytest.mark.parametrize(("package", "imported_first"), [(RAISING, ()), (NOTHING, ("tensorflow",))])
def test_a_foreign_tensorflow_breaks_nothing_and_is_left_alone(tmp_path, package, imported_first):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(package)
    done = fresh_python.run(PROGRAMS / "search_hashed.py", *imported_first, path=(tmp_path,))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]


def test_without_scann_the_error_names_exact(tmp_path):
    (tmp_path / "scann").mkdir()
    (tmp_path / "scann" / "__init__.py").write_text("raise ImportError('no wheel here')")
    done = fresh_python.run(PROGRAMS / "open_scann_index.py", path=(tmp_path,))
    assert done.returncode == 0, done.stderr
    assert "use the index exact" in done.stdout


def test_importing_the_memory_loads_neither_scann_nor_jax():
    loaded = fresh_python.modules_loaded_by("rag_mm.memory.retrieval_memory")
    assert not loaded & {"scann", "jax", "tensorflow", "torch"}
