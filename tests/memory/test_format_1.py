"""A memory written when records held one tokenizer's codes is read and extended as any other."""

import pathlib
import tarfile

import numpy as np
import pytest
from stand_in import StandInEncoder, StandInTokenizer, make_documents

from rag_mm.memory import retrieval_memory

STORED = pathlib.Path(__file__).parent / "golden" / "memory_format_1.tar.gz"
TOKENIZER = StandInTokenizer().fingerprint


@pytest.fixture
def old(tmp_path):
    """Three captioned images, `two-images` (text, image, text, image) and `text-only`; an exact index."""
    with tarfile.open(STORED) as tar:
        tar.extractall(tmp_path / "mem", filter="data")
    return retrieval_memory.Memory.open(tmp_path / "mem", StandInEncoder())


def test_it_is_read_as_before(old, tokenizer):
    assert old.verify() == []
    assert old.ids == ("doc-000", "doc-001", "doc-002", "two-images", "text-only")
    for row, document in enumerate(make_documents(3)):
        assert old.document(row).text == document.text
        np.testing.assert_array_equal(old.document(row).image, document.image)
    pictures = np.stack([old.document(row).image for row in range(4)])
    np.testing.assert_array_equal(old.codes[:4], tokenizer.encode(pictures))
    assert old.codes[4].tolist() == [-1] * 4
    np.testing.assert_array_equal(old.record(3).first_codes(TOKENIZER), old.codes[3])
    assert list(old.record(3).codes[TOKENIZER]) == [1]
    assert old.record(4).codes == {}
    assert old.search(text="thing number1", k=1).ids.tolist() == [[1]]


def test_it_grows_and_its_other_images_get_codes(old, tokenizer):
    grown = old.add(make_documents(4, 10), tokenizer)
    assert grown.verify() == []
    np.testing.assert_array_equal(grown.codes[:5], old.codes)
    filled = grown.remove(ids=["doc-001"]).add_codes(tokenizer)
    assert filled.verify() == []
    assert filled.ids == tuple(name for name in grown.ids if name != "doc-001")
    np.testing.assert_array_equal(filled.codes, np.delete(grown.codes, 1, axis=0))
    document = filled.document(2)
    assert document.id == "two-images"
    np.testing.assert_array_equal(
        filled.record(2).picture_codes(TOKENIZER), tokenizer.encode(np.stack(document.pictures))
    )
    assert [s.pixels.shape for s in document.segments[1::2]] == [(8, 8, 3)] * 2
