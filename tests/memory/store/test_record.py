"""Records survive the round trip, and nothing else passes for one."""

import msgpack
import numpy as np
import pytest

from rag_mm.core import image_files
from rag_mm.core.document_types import Document, Image, Text, Video
from rag_mm.core.errors import UserError
from rag_mm.memory.store import record

PNG = image_files.encode_png(np.zeros((2, 2, 3), np.uint8))
WIDE = image_files.encode_png(np.zeros((2, 3, 3), np.uint8))


@pytest.fixture
def entry():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    video = Video(rng.integers(0, 256, (2, 3, 4, 3), dtype=np.uint8), 12.5)
    segments = (Text("ä text"), Image(pixels), Text("more"), video)
    document = Document("a", segments, url=None, license="CC0")
    embeddings = {"image": rng.normal(size=4).astype(np.float32), "text": np.zeros(4, np.float32)}
    frames = np.array([[4, 5, 6], [7, 8, 9]], np.int32)
    codes = {"abc": {1: np.array([3, 1, 2], np.int32), 3: frames}, "xyz": {3: frames[:, :1]}}
    return record.Record(document, embeddings, codes)


def test_round_trip(entry):
    data = record.to_bytes(entry)
    found = record.from_bytes(data)
    assert found.document.id == "a"
    assert found.document.text == "ä text more"
    assert (found.document.url, found.document.license) == (None, "CC0")
    np.testing.assert_array_equal(found.document.image, entry.document.image)
    for view in ("image", "text"):
        np.testing.assert_array_equal(found.embeddings[view], entry.embeddings[view])
    video = found.document.segments[3]
    np.testing.assert_array_equal(video.frames, entry.document.segments[3].frames)
    assert video.fps == 12.5
    assert {name: sorted(codes) for name, codes in found.codes.items()} == {
        "abc": [1, 3],
        "xyz": [3],
    }
    for name, codes in entry.codes.items():
        for i, values in codes.items():
            np.testing.assert_array_equal(found.codes[name][i], values)
            assert found.codes[name][i].dtype == np.int32
    assert record.to_bytes(found) == data


def test_codes_are_read_by_tokenizer(entry):
    assert entry.first_codes("abc").tolist() == [3, 1, 2]
    assert [codes.tolist() for codes in entry.picture_codes("abc")] == [
        [3, 1, 2], [4, 5, 6], [7, 8, 9],
    ]  # fmt: skip
    assert entry.first_codes(None) is entry.first_codes("other") is None
    assert (
        entry.first_codes("xyz") is None
    )  # It has codes of the video, which is not the first picture.
    with pytest.raises(UserError, match="Segment 1 of document 'a' has no codes"):
        entry.picture_codes("xyz")
    clip = Document("b", (Text("a"), entry.document.segments[3]))
    assert record.Record(clip, {}, {"t": {1: np.array([[4], [5]])}}).first_codes("t").tolist() == [
        4
    ]


@pytest.mark.parametrize("segment", [0, 4])
def test_codes_of_what_is_no_picture_are_not_written(entry, segment):
    codes = {"abc": {segment: np.array([3], np.int32)}}
    with pytest.raises(ValueError, match="do not fit segment"):
        record.to_bytes(record.Record(entry.document, {}, codes))


def test_a_record_of_format_1_is_read(entry):
    fields = msgpack.unpackb(record.to_bytes(entry))
    codes = np.array([3, 1, 2], "<i4").tobytes()
    old = fields | {
        "format": 1, "segments": fields["segments"][:3], "codes": codes, "tokenizer": "abc",
    }  # fmt: skip
    found = record.from_bytes(msgpack.packb(old))
    assert found.document.text == "ä text more"
    assert found.first_codes("abc").tolist() == [3, 1, 2]
    assert record.from_bytes(record.to_bytes(found)).first_codes("abc").tolist() == [3, 1, 2]
    assert record.from_bytes(msgpack.packb(old | {"codes": None, "tokenizer": None})).codes == {}
    for change in ({"codes": None}, {"tokenizer": 3}, {"segments": []}, {"codes": b"123"}):
        with pytest.raises(UserError):
            record.from_bytes(msgpack.packb(old | change))


def test_pictures_are_decoded_only_while_a_document_is_within_its_limit(entry, monkeypatch):
    data = record.to_bytes(entry)
    monkeypatch.setattr(image_files, "MAX_DOCUMENT_PIXELS", 5 * 7 + 2 * 3 * 4)
    record.from_bytes(data)
    monkeypatch.setattr(image_files, "MAX_DOCUMENT_PIXELS", 5 * 7 + 2 * 3 * 4 - 1)
    with pytest.raises(UserError, match="A stored image is RGB 4x3"):
        record.from_bytes(data)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 3}, "format"),
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
        ({"segments": [{"video": b"", "fps": 1.0}]}, "segment"),
        ({"segments": [{"video": [], "fps": 1.0}]}, "damaged"),
        ({"segments": [{"video": [PNG], "fps": -1.0}], "codes": {}}, "fps"),
        ({"segments": [{"video": [PNG], "fps": 1}], "codes": {}}, "fps"),
        ({"segments": [{"video": [PNG, WIDE], "fps": 1.0}], "codes": {}}, "damaged"),
        ({"codes": None}, "tokenizer"),
        ({"codes": {"a": [[0, [1], b"1234"]]}}, "do not fit segment 0"),
        ({"codes": {"a": [[1, [2], b"1234"]]}}, "do not fit segment 1"),
        ({"codes": {"a": [[3, [1, 1], b"1234"]]}}, "do not fit segment 3"),
        ({"codes": {"a": [[4, [1], b"1234"]]}}, "no segment"),
        ({"codes": {"a": [[1, [1], b"1234"]] * 2}}, "no segment"),
        ({"codes": {"a": [[1, [-1], b"1234"]]}}, "do not fit segment 1"),
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
