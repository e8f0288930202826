"""Rows in several mapped files read as those of one array."""

import numpy as np
import pytest
from stand_in import StandInEncoder, make_documents

from rag_mm.memory.retrieval_memory import Memory
from rag_mm.memory.store.mapped_rows import MappedRows
from rag_mm.memory.writing import writer

DIM = 3


@pytest.fixture
def parts(tmp_path):
    """Files of 4, 0 and 5 rows."""
    rng, found = np.random.default_rng(0), []
    for number, count in enumerate((4, 0, 5)):
        path = tmp_path / f"{number}.npy"
        np.save(path, rng.normal(size=(count, DIM)).astype(np.float16))
        found.append(np.load(path, mmap_mode="r"))
    return found


def test_rows_are_those_of_the_files_one_after_the_other(parts):
    rows, whole = MappedRows(parts, DIM), np.concatenate(parts).astype(np.float32)
    assert len(rows) == 9 and rows.shape == (9, DIM)
    wanted = np.array([[8, 0, 3], [4, 4, 2]])
    found = rows[wanted]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, whole[wanted])
    np.testing.assert_array_equal(rows[2:6], whole[2:6])
    np.testing.assert_array_equal(rows[:], whole)


def test_a_missing_row_is_zeros(parts):
    found = MappedRows(parts, DIM)[np.array([-1, 8])]
    assert not found[0].any() and found[1].any()


def test_rows_that_do_not_count_have_no_number(parts):
    stored = np.array([1, 5, 8])
    rows = MappedRows(parts, DIM, stored)
    assert len(rows) == 3
    np.testing.assert_array_equal(rows[np.array([2, 0])], np.concatenate(parts)[[8, 1]])


def test_whole_numbers_stay_exact(tmp_path):
    numbers = np.array([[2**24 + 1]], np.int32)
    assert MappedRows([numbers], 1, dtype=np.int32)[np.array([0])].item() == 2**24 + 1


def test_the_embeddings_of_a_memory_whose_rows_were_removed_and_added(tmp_path):
    encoder = StandInEncoder()
    options = writer.Options(batch_size=4, index="exact")
    memory = Memory.build(tmp_path / "mem", make_documents(6), encoder, options=options)
    memory = memory.add(make_documents(3, start=6)).remove(["doc-001"])
    for view in ("image", "text"):
        np.testing.assert_array_equal(memory.mapped(view)[:], memory.embeddings(view))
    assert len(memory.mapped("image")) == 8
