"""Eight threads search for half a minute while one changes the memory: exact answers, and no one waits."""

import threading
import time

import numpy as np
import pytest
from stand_in import StandInEncoder, make_documents

from rag_mm.memory import retrieval_memory
from rag_mm.memory.index import scann
from rag_mm.memory.writing import writer

pytestmark = pytest.mark.slow
OPTIONS = {
    "exact": writer.Options("exact", None, 16, 64),
    "hashed": writer.Options("scann", scann.ScannConfig(scoring="hashed"), 16, 64),
}
SECONDS = 30


class Workload:
    """Readers and a writer on one memory, until the time is over or an answer is wrong."""

    def __init__(self, path, options: writer.Options):
        self.path, self.options = path, options
        self.memory = retrieval_memory.Memory.build(
            path, make_documents(40), StandInEncoder(), options=options
        )
        self.failures: list[str] = []
        self.searches = [0] * 8
        self.changes = 0

    def run(self) -> None:
        self._deadline = time.monotonic() + SECONDS
        threads = [threading.Thread(target=self._read, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        self._write()
        for thread in threads:
            thread.join()

    def _is_running(self) -> bool:
        return time.monotonic() < self._deadline and not self.failures

    def _read(self, reader: int) -> None:
        rng = np.random.default_rng(reader)
        while self._is_running():
            try:
                is_reopened = rng.random() < 0.2
                self._check_search(
                    retrieval_memory.Memory.open(self.path) if is_reopened else self.memory, rng
                )
                self.searches[reader] += 1
            except Exception as error:
                self.failures.append(repr(error))

    def _check_search(self, memory: retrieval_memory.Memory, rng: np.random.Generator) -> None:
        """Searches for three of the version's own rows: the scores must be those of exact search."""
        rows = memory.embeddings("text")
        queries = rng.integers(len(rows), size=3)
        hits = memory.search(vectors=rows[queries], view="text", k=5)
        best = np.sort(rows[queries] @ rows.T, axis=1)[:, ::-1][:, :5]
        names = [memory.document(int(row)).id for row in hits.ids[:, 0]]
        if names != [memory.ids[row] for row in queries]:
            self.failures.append(f"searched for {queries}, found {names}")
        if not np.allclose(hits.scores, best, atol=1e-5):
            self.failures.append(f"scores {hits.scores} instead of {best}")

    def _write(self) -> None:
        """Adds eight documents, removes eight, compacts; and again."""
        rng, count = np.random.default_rng(100), 40
        while self._is_running():
            action = self.changes % 3
            if action == 0:
                self.memory = self.memory.add(make_documents(8, count), options=self.options)
                count += 8
            elif action == 1:
                removed = rng.choice(self.memory.ids, 8, replace=False).tolist()
                self.memory = self.memory.remove(removed)
            else:
                self.memory = self.memory.compact()
            self.changes += 1


@pytest.fixture(scope="module", params=OPTIONS)
def workload(request, tmp_path_factory):
    workload = Workload(tmp_path_factory.mktemp("concurrent") / "mem", OPTIONS[request.param])
    workload.run()
    return workload


def test_every_answer_is_that_of_exact_search_over_the_readers_version(workload):
    assert not workload.failures, workload.failures[0]


def test_readers_and_the_writer_make_progress(workload):
    assert min(workload.searches) > 10 and workload.changes > 10


def test_the_memory_is_intact_afterwards(workload):
    assert workload.memory.verify() == []
