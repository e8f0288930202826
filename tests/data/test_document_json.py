"""Documents of any segments, in a folder and in a tar: good ones in full, bad ones named with a reason."""

import json
import pathlib
import unicodedata

import hostile
import numpy as np
import pytest

from rag_mm.core import image_files
from rag_mm.core.document_types import Document, Image, Text, Video
from rag_mm.data import (
    array_records,
    beam_ingest,
    document_json,
    open_documents,
    source_ranges,
    sources,
    tar_samples,
)

PNG = hostile.encoded(hostile.pixels())
SEGMENTS = [
    {"text": " before\n"},
    {"image": "0.png"},
    {"image": "1.png"},
    {"text": "between"},
    {"video": ["2.png", "3.png"], "fps": 12},
]


def check_document(document: Document) -> None:
    """It is the document of `SEGMENTS`, where file `i.png` holds `hostile.pixels(i)`."""
    before, first, second, between, video = document.segments
    assert (before, between) == (Text("before"), Text("between"))
    for i, image in enumerate((first, second)):
        assert isinstance(image, Image)
        np.testing.assert_array_equal(image.pixels, hostile.pixels(i))
    assert isinstance(video, Video)
    np.testing.assert_array_equal(video.frames, [hostile.pixels(2), hostile.pixels(3)])
    assert video.fps == 12.0
    np.testing.assert_array_equal(document.image, hostile.pixels(0))


def write_folder(folder: pathlib.Path, *lines: dict) -> pathlib.Path:
    """Images 0.png to 3.png, bits.png of another size, small.png and a file that is no image."""
    for i in range(4):
        (folder / f"{i}.png").write_bytes(hostile.encoded(hostile.pixels(i)))
    (folder / "bits.png").write_bytes(hostile.READ["bits.png"][0])
    (folder / "small.png").write_bytes(hostile.encoded(hostile.pixels(0, 2, 2)))
    (folder / "text.png").write_bytes(b"text")
    (folder / sources.CAPTIONS).write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_a_folder_holds_documents_of_any_segments_beside_captioned_images(tmp_path):
    own = {
        "id": unicodedata.normalize("NFD", "é1"),
        "segments": SEGMENTS,
        "url": "http://a",
        "license": "CC0",
    }
    lines = [
        {"image": "0.png", "caption": "zero"},
        own,
        {"id": "words", "segments": [{"text": "only"}]},
        {"id": "picture", "segments": [{"image": "bits.png"}], "more": 1},
    ]
    found = sources.FolderDocuments(write_folder(tmp_path, *lines))
    assert found.rejects == []
    old, new, words, picture = (found[i] for i in range(4))
    assert (old.id, old.text, len(old.segments)) == ("0", "zero", 2)
    check_document(new)
    assert (new.id, new.url, new.license) == ("é1", "http://a", "CC0")
    assert (words.segments, words.image) == ((Text("only"),), None)
    assert [type(s) for s in picture.segments] == [Image]
    *_, last = open_documents.open_documents(str(tmp_path)).read(0)
    assert last.notes == ("1-bit",)


BAD = [
    ({"segments": SEGMENTS}, "line 2", "bad-field", "no id"),
    ({"id": " ", "segments": SEGMENTS}, " ", "bad-field", "no id"),
    ({"id": 3, "segments": SEGMENTS}, "line 2", "bad-field", "no id"),
    ({"id": "a", "segments": SEGMENTS, "url": 3}, "a", "bad-field", "url that is not text"),
    ({"id": "a\ud800", "segments": SEGMENTS}, "a?", "not-utf8", "surrogate"),
    ({"id": "a", "segments": []}, "a", "bad-segment", "empty"),
    ({"id": "a", "segments": {"text": "a"}}, "a", "bad-segment", "no list"),
    ({"id": "a", "segments": [{"text": "a"}, "b"]}, "a", "bad-segment", "segment 1"),
    ({"id": "a", "segments": [{"text": " "}]}, "a", "bad-segment", "empty text as segment 0"),
    ({"id": "a", "segments": [{"text": "\ud800"}]}, "a", "not-utf8", "surrogate"),
    ({"id": "a", "segments": [{"text": 3}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"text": "a", "image": "0.png"}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"audio": "a.wav"}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"image": ["0.png"]}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"image": "no.png"}]}, "a", "missing-picture", "'no.png'"),
    ({"id": "a", "segments": [{"image": "/etc/passwd"}]}, "a", "leads-outside", "outside"),
    ({"id": "a", "segments": [{"image": "../a.png"}]}, "a", "leads-outside", "outside"),
    ({"id": "a", "segments": [{"image": "\ud800.png"}]}, "a", "not-utf8", "surrogate"),
    ({"id": "a", "segments": [{"image": ""}]}, "a", "not-json", "names no file"),
    ({"id": "a", "segments": [{"image": "text.png"}]}, "a", "not-a-picture", "'text.png', which is not"),
    ({"id": "a", "segments": [{"video": ["0.png"]}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"video": [], "fps": 1}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"video": "0.png", "fps": 1}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"video": ["0.png"], "fps": 0}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"video": ["0.png"], "fps": True}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"video": ["0.png"], "fps": float("nan")}]}, "a", "bad-segment", "segment 0"),
    ({"id": "a", "segments": [{"video": ["0.png"], "fps": 10**400}]}, "a", "bad-segment", "segment 0"),
    (
        {"id": "a", "segments": [{"video": ["0.png", "small.png"], "fps": 1}]},
        "a", "uneven-frames", "one size",
    ),
    ({"id": "good", "segments": SEGMENTS}, "good", "", "has the id 'good' of an earlier record"),
]  # fmt: skip


def test_bad_documents_are_rejected_by_name_and_reason(tmp_path):
    good = {"id": "good", "segments": SEGMENTS}
    for fields, name, reason, detail in BAD:
        found = sources.FolderDocuments(write_folder(tmp_path, good, fields))
        assert [named for named, _ in found.rejects] == [name], fields
        assert detail in found.rejects[0][1], fields
        _, item = open_documents.open_documents(str(tmp_path)).read(0)
        assert (item.reject.reason if item.reject else "") == reason, fields


def test_the_sizes_of_a_document_are_bounded(tmp_path, monkeypatch):
    one = {"id": "a", "segments": SEGMENTS}
    many = {"id": "b", "segments": [{"text": "a"}] * (document_json.MAX_SEGMENTS + 1)}
    frames = {"id": "c", "segments": [{"video": ["0.png"] * 9000, "fps": 1}]}
    write_folder(tmp_path, one, many, frames)
    reasons = [
        item.reject and item.reject.reason for item in sources.FolderSource(tmp_path).read(0)
    ]
    assert reasons == [None, "too-many-segments", "too-many-segments"]
    monkeypatch.setattr(image_files, "MAX_DOCUMENT_PIXELS", 4 * 6 * 9)
    assert next(sources.FolderSource(tmp_path).read(0)).document is not None
    monkeypatch.setattr(image_files, "MAX_DOCUMENT_PIXELS", 4 * 6 * 9 - 1)
    reject = next(sources.FolderSource(tmp_path).read(0)).reject
    assert reject.reason == "too-many-pixels"
    assert "'3.png'" in reject.detail


ENDINGS = [
    {"text": " before\n"},
    {"image": "PNG"},
    {"image": "a.1.png"},
    {"text": "between"},
    {"video": ["2.png", "3.png"], "fps": 12},
]


def add_document(tar, key: str, fields: dict, json_first: bool) -> None:
    """A document whose pictures are members of its sample, after or before its `.json`."""
    data = json.dumps(fields).encode()
    if json_first:
        hostile.member(tar, f"{key}.json", data)
    for i, ending in enumerate(("PNG", "a.1.png", "2.png", "3.png")):
        hostile.member(tar, f"{key}.{ending}", hostile.encoded(hostile.pixels(i)))
    if not json_first:
        hostile.member(tar, f"{key}.json", data)


@pytest.mark.parametrize("json_first", [True, False])
def test_a_tar_holds_documents_of_any_segments_beside_captioned_images(
    tmp_path, make_tar, json_first
):
    def fill(tar):
        hostile.sample(tar, "x/0", PNG, b"zero")
        add_document(tar, "x/1", {"segments": ENDINGS, "license": "CC0"}, json_first)
        add_document(tar, "x/2", {"segments": ENDINGS, "id": "own"}, json_first)
        hostile.member(tar, "x/3.json", b'{"segments": [{"text": "only"}]}')
        hostile.sample(tar, "x/4", PNG, b"four")

    source = make_tar(tmp_path, fill)
    items = list(source.read(0))
    assert [item.reject for item in items] == [None] * 5
    documents = [item.document for item in items]
    assert [d.id for d in documents] == ["x/0", "x/1", "own", "x/3", "x/4"]
    check_document(documents[1])
    check_document(documents[2])
    assert documents[1].license == "CC0"
    assert documents[3].segments == (Text("only"),)
    assert [len(d.segments) for d in documents] == [2, 5, 5, 1, 2]
    assert [i.document.id for i in source.read(items[1].position)] == ["own", "x/3", "x/4"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("9.png", "missing-member"),
        ("../0.png", "missing-member"),
        ("/etc/passwd", "missing-member"),
        ("json", "missing-member"),
        ("npy", "missing-member"),
        ("own.png", "missing-member"),  # It has a caption, so it is a document of its own.
        ("bad.png", "not-a-picture"),
    ],
)
def test_a_picture_that_a_tar_does_not_have_is_named(tmp_path, make_tar, name, reason):
    def fill(tar):
        hostile.member(tar, "0.bad.png", b"text")
        hostile.sample(tar, "0.own", PNG, b"its caption")
        hostile.member(tar, "0.npy", b"123")
        hostile.member(tar, "0.json", json.dumps({"segments": [{"image": name}]}).encode())
        hostile.sample(tar, "1", PNG, b"one")

    items = list(make_tar(tmp_path, fill).read(0))
    assert [item.document.id for item in items if item.document] == ["0.own", "1"]
    (reject,) = [item.reject for item in items if item.reject]
    assert (reject.name, reject.reason) == ("0", reason)
    assert repr(name) in reject.detail


def test_the_pictures_of_a_sample_are_bounded(tmp_path, make_tar, monkeypatch):
    def fill(tar):
        add_document(tar, "0", {"segments": ENDINGS}, json_first=True)
        hostile.sample(tar, "1", PNG, b"one")

    monkeypatch.setattr(tar_samples, "MAX_SAMPLE_BYTES", 2 * len(PNG))
    first, second = make_tar(tmp_path, fill).read(0)
    assert (first.reject.name, first.reject.reason) == ("0", "oversized-sample")
    assert second.document.id == "1"


def test_array_records_keep_every_segment(tmp_path):
    folder = write_folder(tmp_path, {"id": "a", "segments": SEGMENTS, "url": "http://a"})
    (item,) = open_documents.open_documents(str(folder)).read(0)
    path = tmp_path / "a.arrayrecord"
    assert array_records.write_documents(path, [item.document]) == 1
    (again,) = open_documents.open_documents(str(path)).read(0)
    check_document(again.document)
    assert (again.document.id, again.document.url) == ("a", "http://a")


def test_a_range_written_by_a_beam_worker_keeps_every_segment(tmp_path):
    lines = [{"id": "a", "segments": SEGMENTS}, {"id": "b", "segments": [{"image": "no.png"}]}]
    folder = write_folder(tmp_path, *lines)
    result = beam_ingest.write_range(source_ranges.Range(0, 0, 2), str(folder), str(tmp_path))
    assert result.added == 1
    assert [(r.name, r.reason) for r in result.rejects] == [("b", "missing-picture")]
    path = tmp_path / "documents-00000.arrayrecord"
    (item,) = open_documents.open_documents(str(path)).read(0)
    check_document(item.document)
