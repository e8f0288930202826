"""SIGKILL at any instant: what was reported done is there, and starting again ends as if unbroken."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import killed
import numpy as np
import pytest
from stand_in import StandInEncoder, make_documents

import rag_mm
from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory
from rag_mm.memory.index import scann as scann_index
from rag_mm.memory.store import verify
from rag_mm.memory.writing import writer

ROOT = pathlib.Path(rag_mm.__file__).parents[1]
SCRIPT = str(pathlib.Path(killed.__file__))


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(pathlib.Path(SCRIPT).parent)])
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture(scope="module")
def killed_memories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, SCRIPT, "points", str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    endings = json.loads(done.stdout)
    assert set(endings.values()) == {int(signal.SIGKILL)}, endings
    return folder


@pytest.mark.parametrize("point", killed.POINTS)
@pytest.mark.parametrize("action", killed.ACTIONS)
def test_killed_at_a_named_point(killed_memories, action, point):
    path = killed_memories / f"{action} {point}"
    first = [f"doc-{i:03d}" for i in range(15)]
    before = {"build": None, "add": first, "compact": sorted(set(first) - set(killed.GONE))}
    after = {"build": first, "add": [f"doc-{i:03d}" for i in range(30)]}
    after["compact"] = before["compact"]
    if point == "after the switch":
        assert verify.verify(path) == []
        assert list(retrieval_memory.Memory.open(path).ids) == after[action]
        return
    if before[action] is None:
        with pytest.raises(UserError, match="was not finished"):
            retrieval_memory.Memory.open(path)
    else:
        assert verify.verify(path) == []
        assert list(retrieval_memory.Memory.open(path).ids) == before[action]
    encoder = StandInEncoder()
    if action == "build":
        retrieval_memory.Memory.build(path, make_documents(15), encoder, options=killed.OPTIONS)
    elif action == "add":
        retrieval_memory.Memory.open(path, encoder).add(
            make_documents(15, 15), options=killed.OPTIONS
        )
    else:
        retrieval_memory.Memory.open(path).compact(prune=True)
    # Of three shards of two batches, each of texts and of images, what was committed is not made again.
    batches = {"shard written": 10, "shard committed": 6, "index saved": 0, "before the switch": 0}
    assert len(encoder.batches) == (batches[point] if action != "compact" else 0)
    assert verify.verify(path) == []
    assert list(retrieval_memory.Memory.open(path).ids) == after[action]


def test_a_resumed_build_has_the_bytes_of_an_unbroken_one(killed_memories, tmp_path):
    path = killed_memories / "again"
    killed.ACTIONS["build"](path)
    whole = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for marker in (path / "v000001" / "commit-00002.json", path / "CURRENT"):
        marker.unlink()
    killed.ACTIONS["build"](path)
    assert {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()} == whole


def test_other_documents_are_not_mixed_with_those_of_a_killed_build(tmp_path):
    path = tmp_path / "mem"
    killed.ACTIONS["build"](path)
    (path / "CURRENT").unlink()
    built = retrieval_memory.Memory.build(
        path, make_documents(15, 1), StandInEncoder(), options=killed.OPTIONS
    )
    assert built.ids == tuple(f"doc-{i:03d}" for i in range(1, 16))
    assert built.verify() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_instant(tmp_path, seed):
    path, log = tmp_path / "mem", tmp_path / "log"
    command = [sys.executable, SCRIPT, "run", str(path), str(log), str(seed)]
    process = subprocess.Popen(command, env=environment())
    try:
        while not log.exists() or not log.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(np.random.default_rng(seed).uniform(0.0, 2.0))
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert verify.verify(path) == []
    begun = int(log.read_text().split()[-1])
    states = [[f"doc-{i:03d}" for i in range(15)]]
    states += [live for _, _, live in itertools.islice(killed.operations(seed), begun + 1)]
    # Operation `begun` was under way: all before it were reported done.
    assert list(retrieval_memory.Memory.open(path).ids) in states[begun : begun + 2]
    opened = retrieval_memory.Memory.open(path, StandInEncoder()).add(make_documents(3, 900))
    assert (opened.verify(), opened.ids[-1]) == ([], "doc-902")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact", "hashed"])
def test_eight_threads_search_while_one_changes(tmp_path, kind):
    """For half a minute each: every answer is that of exact search over the reader's own version."""
    encoder = StandInEncoder()
    scann = scann_index.ScannConfig(scoring="hashed") if kind == "hashed" else None
    options = writer.Options("exact" if kind == "exact" else "scann", scann, 16, 64)
    current = retrieval_memory.Memory.build(
        tmp_path / "mem", make_documents(40), encoder, options=options
    )
    failures: list[str] = []
    searches = [0] * 8
    deadline = time.monotonic() + 30

    def search(thread: int) -> None:
        rng = np.random.default_rng(thread)
        while time.monotonic() < deadline and not failures:
            try:
                mine = (
                    retrieval_memory.Memory.open(tmp_path / "mem")
                    if rng.random() < 0.2
                    else current
                )
                rows = mine.embeddings("text")
                asked = rng.integers(len(rows), size=3)
                found = mine.search(vectors=rows[asked], view="text", k=5)
                best = np.sort(rows[asked] @ rows.T, axis=1)[:, ::-1][:, :5]
                names = [mine.document(int(row)).id for row in found.ids[:, 0]]
                if names != [mine.ids[row] for row in asked]:
                    failures.append(f"asked for {asked}, found {names}")
                if not np.allclose(found.scores, best, atol=1e-5):
                    failures.append(f"scores {found.scores} instead of {best}")
                searches[thread] += 1
            except Exception as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=search, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    count, changes = 40, 0
    rng = np.random.default_rng(100)
    while time.monotonic() < deadline and not failures:
        action = changes % 3
        if action == 0:
            current = current.add(make_documents(8, count), options=options)
            count += 8
        elif action == 1:
            current = current.remove(rng.choice(current.ids, 8, replace=False).tolist())
        else:
            current = current.compact()
        changes += 1
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert min(searches) > 10 and changes > 10
    assert current.verify() == []
