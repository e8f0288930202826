"""Strangers' records of every kind: each is read by a rule or refused by name and reason."""

import io
import json
import os
import tarfile

import hostile
import numpy as np
import pytest

from rag_mm.core import document_types
from rag_mm.core.errors import UserError
from rag_mm.data import array_records, image_decoding, open_documents, sources, webdataset


def items(source, start=0):
    return list(source.read(start))


@pytest.fixture
def folder(tmp_path):
    """Everything in `hostile`, in one folder of pictures."""
    lines = []
    for name, (data, _) in (hostile.READ | hostile.REFUSED).items():
        (tmp_path / name).write_bytes(data)
        lines.append(hostile.line(name))
    (tmp_path / "good.png").write_bytes(hostile.encoded(hostile.pixels(5)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "plain.png").write_bytes(hostile.encoded(hostile.pixels(6)))
    os.mkfifo(tmp_path / "pipe.png")
    lines += [line for line, reason in hostile.LINES.items() if reason != "duplicate-id"]
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_file_of_a_folder_by_its_rule(folder):
    found = items(sources.FolderSource(folder))
    assert [item.position for item in found] == list(range(1, len(found) + 1))
    kinds = {**hostile.READ, **hostile.REFUSED}
    for (name, (_, expected)), item in zip(kinds.items(), found[: len(kinds)], strict=True):
        if item.document is None:
            assert (item.reject.name, item.reject.reason) == (name, expected), item.reject
        else:
            assert set(item.notes) == expected, name
            assert item.document.id == name.rpartition(".")[0]
            assert item.document.image.dtype == np.uint8
    reasons = [reason for reason in hostile.LINES.values() if reason != "duplicate-id"]
    assert [item.reject.reason for item in found[len(kinds) :]] == reasons
    turned = next(i.document for i in found if i.document and i.document.id == "turned")
    np.testing.assert_array_equal(turned.image, np.rot90(hostile.pixels(), -1))


def test_every_code_has_a_rule_in_words():
    notes = {note for _, expected in hostile.READ.values() for note in expected}
    assert notes == set(image_decoding.NOTES)
    reasons = {reason for _, reason in hostile.REFUSED.values()}
    assert reasons == set(image_decoding.REFUSALS) - {"too-many-bytes"}


def test_a_file_of_too_many_bytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(hostile.encoded(hostile.pixels()))
    (tmp_path / "captions.jsonl").write_bytes(hostile.line("a.png"))
    assert items(sources.FolderSource(tmp_path))[0].reject.reason == "too-many-bytes"


def test_reading_goes_on_from_any_position(folder, tmp_path_factory):
    tars = tmp_path_factory.mktemp("tars")
    documents = [
        document_types.Document(
            f"d{i}", (document_types.Text(f"word {i}"), document_types.Image(hostile.pixels(i)))
        )
        for i in range(4)
    ]
    array_records.write_documents(tars / "some.arrayrecord", documents)
    for number in range(3):
        with tarfile.open(tars / f"{number}.tar", "w") as tar:
            for i in range(4):
                sample = hostile.encoded(hostile.pixels(i))
                hostile.sample(tar, f"{number}/{i}", sample, b"caption" if i != 2 else None)
    for source in (
        sources.FolderSource(folder),
        webdataset.TarSource(sorted(tars.glob("*.tar"))),
        open_documents.open_documents(str(tars / "some.arrayrecord")),
    ):
        whole = items(source)
        for place, item in enumerate(whole):
            rest = items(source, item.position)
            assert [i.position for i in rest] == [i.position for i in whole[place + 1 :]]
            assert [_name(i) for i in rest] == [_name(i) for i in whole[place + 1 :]]


def _name(item) -> str:
    return item.document.id if item.document else item.reject.name


PNG = hostile.encoded(hostile.pixels())


def make_tar(tmp_path, fill, name="a.tar"):
    with tarfile.open(tmp_path / name, "w", format=tarfile.PAX_FORMAT) as tar:
        fill(tar)
    return webdataset.TarSource([tmp_path / name])


def test_good_samples_of_a_tar(tmp_path):
    def fill(tar):
        hostile.member(tar, "some", type=tarfile.DIRTYPE)
        hostile.sample(tar, "some/0", PNG, "zéro".encode())
        hostile.member(tar, "some/1.jpg", hostile.encoded(hostile.pixels(1), "JPEG"))
        fields = {"caption": "one", "url": "http://a/b", "license": "CC0", "more": [1]}
        hostile.member(tar, "some/1.json", json.dumps(fields).encode())
        hostile.member(tar, "some/2.webp", hostile.encoded(hostile.pixels(2), "WEBP"))
        hostile.member(tar, "some/2.json", b'{"caption": "not this", "license": "MIT"}')
        hostile.member(tar, "some/2.txt", b"this")
        hostile.member(tar, "some/2.npy", bytes(5000))
        hostile.member(tar, "some/3.v2.PNG", PNG)
        hostile.member(tar, "some/4.PNG", PNG)
        hostile.member(tar, "some/4.TXT", b"capitals")

    found = items(make_tar(tmp_path, fill))
    good = [i.document for i in found if i.document]
    assert [d.id for d in good] == ["some/0", "some/1", "some/2", "some/4"]
    assert [d.text for d in good] == ["zéro", "one", "this", "capitals"]
    assert (good[1].url, good[1].license, good[2].license) == ("http://a/b", "CC0", "MIT")
    np.testing.assert_array_equal(good[0].image, hostile.pixels())
    assert [(i.reject.name, i.reject.reason) for i in found if i.reject] == [
        ("some/3", "no-picture")
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]  # Nothing was extracted.


def test_every_member_that_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", 2000)
    monkeypatch.setattr(webdataset, "MAX_TEXT_BYTES", 100)
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": "99999999"}
    sparse |= {"GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,10"}
    bad = {
        "/absolute": ("leads-outside", dict()),
        "../above": ("leads-outside", dict()),
        "a/../../b": ("leads-outside", dict()),
        "soft": ("link", dict(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0)),
        "hard": ("link", dict(type=tarfile.LNKTYPE, linkname="good.png", size=0)),
        "char": ("device", dict(type=tarfile.CHRTYPE, size=0)),
        "block": ("device", dict(type=tarfile.BLKTYPE, size=0)),
        "pipe": ("device", dict(type=tarfile.FIFOTYPE, size=0)),
        "sparse": ("sparse-member", dict(pax_headers=sparse)),
    }

    def fill(tar):
        hostile.sample(tar, "good", PNG, b"good")
        for key, (_, changes) in bad.items():
            hostile.sample(tar, key, PNG, b"caption", **changes)
        hostile.sample(tar, "large", bytes(3000), b"caption")
        hostile.sample(tar, "talkative", PNG, b"word " * 50)
        hostile.sample(tar, "silent", PNG, None)
        hostile.sample(tar, "blank", PNG, b" \n")
        hostile.sample(tar, "latin", PNG, "é".encode("latin-1"))
        hostile.sample(tar, "b\udcff", PNG, b"caption")
        hostile.sample(tar, "two", PNG, b"caption")
        hostile.member(tar, "two.jpg", hostile.encoded(hostile.pixels(), "JPEG"))
        hostile.member(tar, "broken.png", PNG)
        hostile.member(tar, "broken.json", b"{")
        hostile.member(tar, "list.png", PNG)
        hostile.member(tar, "list.json", b"[]")
        hostile.member(tar, "words.txt", b"no picture")
        hostile.member(tar, "drawing.svg", b"<svg>")
        hostile.sample(tar, "last", PNG, b"last")

    found = items(make_tar(tmp_path, fill))
    reasons = {i.reject.name: i.reject.reason for i in found if i.reject}
    expected = {key: reason for key, (reason, _) in bad.items()} | {
        "large": "oversized-member",
        "talkative": "oversized-member",
        "silent": "empty-caption",
        "blank": "empty-caption",
        "latin": "not-utf8",
        "b?": "not-utf8",
        "two": "duplicate-member",
        "broken": "not-json",
        "list": "not-json",
        "words": "no-picture",
        "drawing": "no-picture",
    }
    assert reasons == expected
    assert [i.document.id for i in found if i.document] == ["good", "last"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_picture_inside_a_tar_by_its_rule(tmp_path):
    kinds = {n: v for n, v in (hostile.READ | hostile.REFUSED).items() if not n.endswith(".gif")}

    def fill(tar):
        for name, (data, _) in kinds.items():
            stem, _, ending = name.partition(".")
            hostile.member(tar, f"{stem}-{ending}.{ending}", data)
            hostile.member(tar, f"{stem}-{ending}.txt", b"caption")

    found = items(make_tar(tmp_path, fill))
    for (name, (_, expected)), item in zip(kinds.items(), found, strict=True):
        actual = item.reject.reason if item.reject else set(item.notes)
        assert actual == expected, name


def test_tars_that_end_too_early_or_are_none(tmp_path):
    def fill(tar):
        for i in range(4):
            hostile.sample(tar, f"{i}", hostile.encoded(hostile.pixels(i, 30, 30)), b"caption")

    make_tar(tmp_path, fill)
    data = (tmp_path / "a.tar").read_bytes()
    third = data.index(b"2.png")
    cases = {
        "inside a member": (data[: third + 700], "truncated-tar", 1),
        "inside a header": (data[: third + 100], "truncated-tar", 1),
        "a header overwritten": (
            data[:third] + b"\xff" * 512 + data[third + 512 :], "damaged-tar", 1
        ),
        "packed": (__import__("gzip").compress(data), "not-a-tar", 0),
        "a picture": (PNG, "not-a-tar", 0),
    }  # fmt: skip
    for name, (content, reason, good) in cases.items():
        (tmp_path / "b.tar").write_bytes(content)
        (tmp_path / "c.tar").write_bytes(data)
        paths = [tmp_path / "b.tar", tmp_path / "c.tar"]
        found = items(webdataset.TarSource(paths))
        assert [i.reject.reason for i in found if i.reject] == [reason], name
        assert len([i for i in found if i.document]) == good + 4, name


def test_no_damage_to_a_tar_crashes(tmp_path):
    def fill(tar):
        for i in range(3):
            hostile.sample(tar, f"{i}", hostile.encoded(hostile.pixels(i)), b"caption")

    make_tar(tmp_path, fill)
    data = (tmp_path / "a.tar").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for place in rng.integers(len(data) - 10_240 + 3000, size=3):
            changed[min(place, len(data) - 1)] ^= 1 << rng.integers(8)
        (tmp_path / "b.tar").write_bytes(changed)
        for item in webdataset.TarSource([tmp_path / "b.tar"]).read(0):
            assert (item.document is None) != (item.reject is None)


def test_our_own_array_records(tmp_path):
    documents = [
        document_types.Document(
            f"d{i}", (document_types.Text(f"word {i}"), document_types.Image(hostile.pixels(i)))
        )
        for i in range(3)
    ]
    path = tmp_path / "some.arrayrecord"
    assert array_records.write_documents(path, iter(documents)) == 3
    for spec in (path, tmp_path):
        found = items(open_documents.open_documents(str(spec)))
        assert [i.document.id for i in found] == ["d0", "d1", "d2"]
        np.testing.assert_array_equal(found[1].document.image, hostile.pixels(1))
    data = bytearray(path.read_bytes())
    data[data.index(b"word 1")] ^= 1
    path.write_bytes(data)
    found = items(array_records.RecordSource([path]))
    assert [i.reject.reason if i.reject else "" for i in found] == ["", "damaged-record", ""]
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="no ArrayRecord file"):
        array_records.RecordSource([path])
    assert [p.name for p in tmp_path.iterdir()] == ["some.arrayrecord"]


def test_specs_that_name_nothing(tmp_path):
    for spec, complaint in (
        (str(tmp_path / "no"), "is not a folder"),
        (str(tmp_path), r"captions\.jsonl"),
        ("tfds:nothing", "names no split"),
        ("tfds:no_such_dataset:train", "TFDS cannot read"),
    ):
        with pytest.raises(UserError, match=complaint):
            open_documents.open_documents(spec)


def test_bytes_io_is_no_path():
    """`decode` takes bytes alone, so that a length is known before anything is read."""
    with pytest.raises(image_decoding.BadPicture) as caught:
        image_decoding.decode(io.BytesIO(PNG).read()[:8])
    assert caught.value.reason == "truncated"
