"""Records survive the round trip, and nothing else passes for one."""

import msgpack
import numpy as np
import pytest

from rag_mm.core import image_files
from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.memory.store import record


@pytest.fixture
def entry():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    document = Document("a", (Text("ä text"), Image(pixels), Text("more")), url=None, license="CC0")
    embeddings = {"image": rng.normal(size=4).astype(np.float32), "text": np.zeros(4, np.float32)}
    return record.Record(document, embeddings, np.array([3, 1, 2], np.int32), "abc")


def test_round_trip(entry):
    data = record.to_bytes(entry)
    found = record.from_bytes(data)
    assert found.document.id == "a"
    assert found.document.text == "ä text more"
    assert (found.document.url, found.document.license) == (None, "CC0")
    np.testing.assert_array_equal(found.document.image, entry.document.image)
    for view in ("image", "text"):
        np.testing.assert_array_equal(found.embeddings[view], entry.embeddings[view])
    np.testing.assert_array_equal(found.codes, [3, 1, 2])
    assert found.codes.dtype == np.int32
    assert found.tokenizer == "abc"
    assert record.to_bytes(found) == data


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "format"),
        ({"id": ""}, "no id"),
        ({"id": 3}, "no id"),
        ({"url": 3}, "url"),
        ({"segments": "text"}, "segments"),
        ({"segments": [{"text": "a", "png": b""}]}, "segment"),
        ({"segments": [{"file": "/etc/passwd"}]}, "segment"),
        ({"segments": [{"png": b"no png"}]}, "cannot be decoded"),
        ({"embeddings": {"image": b"123"}}, "damaged"),
        ({"embeddings": {"image": np.float32([np.nan]).tobytes()}}, "not finite"),
        ({"embeddings": {"../x": b""}}, "view"),
        ({"codes": None}, "tokenizer"),
        ({"more": 1}, "fields"),
    ],
)
def test_every_field_is_checked(entry, change, complaint):
    fields = msgpack.unpackb(record.to_bytes(entry)) | change
    with pytest.raises(UserError, match=complaint):
        record.from_bytes(msgpack.packb(fields))


def test_damaged_bytes_are_refused_whatever_they_are(entry):
    data = record.to_bytes(entry)
    rng = np.random.default_rng(1)
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(UserError):
            record.from_bytes(data[:cut])
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            found = record.from_bytes(bytes(changed))
        except UserError:
            continue
        assert isinstance(found, record.Record)  # A flip in a text or number: digests see it.


def test_fit_keeps_the_middle():
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 200
    np.testing.assert_array_equal(image_files.fit(pixels, 4), np.full((4, 4, 3), 200))
    assert image_files.fit(pixels, 2).shape == (2, 2, 3)
    assert image_files.fit(pixels, 9).shape == (9, 9, 3)
    square = pixels[:, :4]
    assert image_files.fit(square, 4) is square


def test_a_stored_picture_is_an_rgb_png():
    import io

    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.new("L", (3, 3)).save(buffer, format="PNG")
    with pytest.raises(UserError, match="is L 3x3"):
        image_files.decode_png(buffer.getvalue())
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (3, 3)).save(buffer, format="JPEG")
    with pytest.raises(UserError, match="cannot be decoded"):
        image_files.decode_png(buffer.getvalue())
