"""Documents in Parquet files: as on the Hub, checked row by row."""

import hostile
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import open_documents, parquet_files, source_ranges

PNG = hostile.encoded(hostile.pixels())


def write(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two files of five rows, in row groups of two."""
    for number in range(2):
        texts = [f"word {number} {row}" for row in range(5)]
        images = [{"bytes": PNG, "path": None}] * 5
        columns = {"image": images, "text": texts, "license": ["CC0"] * 5}
        write(tmp_path / f"train-{number}.parquet", columns, row_group_size=2)
    return tmp_path


def test_rows_of_a_folder_are_documents_in_order(folder):
    source = open_documents.open_documents(str(folder))
    found = [item.document for item in source.read(0)]
    assert source.size == len(found) == 10
    assert [d.id for d in found[4:6]] == ["train-0/4", "train-1/0"]
    assert (found[6].text, found[6].license) == ("word 1 1", "CC0")
    np.testing.assert_array_equal(found[6].image, hostile.pixels())


@pytest.mark.parametrize("start", range(11))
def test_reading_resumes_at_any_row(folder, start):
    source = open_documents.open_documents(str(folder))
    assert [item.position for item in source.read(start)] == list(range(start + 1, 11))


def test_ranges_split_the_rows(folder):
    source = open_documents.open_documents(str(folder))
    parts = source_ranges.split(source, 3)
    found = [[i.document.id for i in source_ranges.read(source, part)] for part in parts]
    assert [len(part) for part in found] == [3, 3, 3, 1]
    joined = [name for part in found for name in part]
    assert joined == [item.document.id for item in source.read(0)]


def test_bad_rows_are_named_with_a_reason(tmp_path):
    images = [PNG, b"", None, PNG[:40], PNG]
    texts = ["a", "b", "c", "d", None]
    path = write(tmp_path / "t.parquet", {"png": images, "caption": texts, "id": list("vwxyz")})
    items = list(parquet_files.ParquetSource([path]).read(0))
    assert [item.document.id for item in items if item.document] == ["v"]
    assert [(i.reject.name, i.reject.reason) for i in items[1:]] == [
        ("w", "empty-file"),
        ("x", "missing-picture"),
        ("y", "truncated"),
        ("z", "empty-caption"),
    ]


def test_a_file_of_texts_gives_documents_of_a_text(tmp_path):
    path = write(tmp_path / "t.parquet", {"text": ["one", "two"]})
    found = [item.document for item in open_documents.open_documents(str(path)).read(0)]
    assert [(d.text, d.image) for d in found] == [("one", None), ("two", None)]


def test_damaged_rows_are_one_bad_record(folder):
    path = folder / "train-0.parquet"
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # The first page of the first row group.
    path.write_bytes(data)
    items = list(parquet_files.ParquetSource([path]).read(0))
    assert [(i.position, i.reject and i.reject.reason) for i in items] == [
        (2, "damaged-parquet"),
        (3, None),
        (4, None),
        (5, None),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"picture": [PNG]}, "has no column of captions"), (None, "not a readable Parquet file")],
)
def test_a_file_without_captions_is_refused(tmp_path, columns, message):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 nothing") if columns is None else write(path, columns)
    with pytest.raises(UserError, match=message):
        open_documents.open_documents(str(path))
