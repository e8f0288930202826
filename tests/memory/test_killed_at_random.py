"""A writer killed at a random instant: the memory is intact, loses nothing reported, and takes writes."""

import shutil

import killed_writers
import pytest
from stand_in import StandInEncoder, make_documents

from rag_mm.memory import retrieval_memory
from rag_mm.memory.store import verify

pytestmark = pytest.mark.slow


def test_every_file_is_intact(killed_at_random):
    path, _, _ = killed_at_random
    assert verify.verify(path) == []


def test_every_finished_operation_is_kept(killed_at_random):
    """The operation in progress is there entirely or not at all; all before it were reported done."""
    path, seed, operation = killed_at_random
    opened = retrieval_memory.Memory.open(path)
    assert list(opened.ids) in killed_writers.possible_ids(seed, operation)


def test_the_next_write_succeeds(killed_at_random, tmp_path):
    path, _, _ = killed_at_random
    copy = shutil.copytree(path, tmp_path / "mem")
    opened = retrieval_memory.Memory.open(copy, StandInEncoder()).add(make_documents(3, 900))
    assert (opened.verify(), opened.ids[-1]) == ([], "doc-902")
