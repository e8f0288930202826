"""Documents in ArrayRecord files: read back as written; damage is rejected by record or by file."""

import hostile
import numpy as np
import pytest

from rag_mm.core import document_types
from rag_mm.core.errors import UserError
from rag_mm.data import array_records, open_documents


@pytest.fixture
def path(tmp_path):
    """Three documents in `some.arrayrecord`."""
    documents = [
        document_types.Document(
            f"d{i}", (document_types.Text(f"word {i}"), document_types.Image(hostile.pixels(i)))
        )
        for i in range(3)
    ]
    path = tmp_path / "some.arrayrecord"
    assert array_records.write_documents(path, iter(documents)) == 3
    return path


@pytest.mark.parametrize("opened", ["file", "folder"])
def test_documents_are_read_as_written(path, opened):
    spec = path if opened == "file" else path.parent
    items = list(open_documents.open_documents(str(spec)).read(0))
    assert [item.document.id for item in items] == ["d0", "d1", "d2"]
    np.testing.assert_array_equal(items[1].document.image, hostile.pixels(1))


def test_a_damaged_record_is_rejected_alone(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"word 1")] ^= 1
    path.write_bytes(data)
    items = list(array_records.ArrayRecordSource([path]).read(0))
    assert [i.reject.reason if i.reject else "" for i in items] == ["", "damaged-record", ""]


def test_half_a_file_is_refused(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is not an ArrayRecord file"):
        array_records.ArrayRecordSource([path])


def test_two_workers_that_write_the_same_file_do_not_mix(path):
    """As when a worker is started again while the first still runs."""
    (first, *_) = array_records.ArrayRecordSource([path]).read(0)

    def documents():
        yield first.document
        assert array_records.write_documents(path, iter([first.document] * 2)) == 2

    assert array_records.write_documents(path, documents()) == 1
    assert len(list(array_records.ArrayRecordSource([path]).read(0))) == 1
    assert [p.name for p in path.parent.iterdir()] == ["some.arrayrecord"]


def test_only_the_file_itself_is_written(path):
    list(open_documents.open_documents(str(path)).read(0))
    assert [p.name for p in path.parent.iterdir()] == ["some.arrayrecord"]
