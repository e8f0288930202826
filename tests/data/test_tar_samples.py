"""Samples of a WebDataset tar: which members make one document, and what its fields are."""

import json
import os
import tarfile
import unicodedata

import hostile
import numpy as np
import pytest

from rag_mm.data import webdataset

PNG = hostile.encoded(hostile.pixels())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tar")


@pytest.fixture(scope="module")
def items(folder, make_tar):
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
        hostile.member(tar, "some/5.txt", b"no picture")

    return list(make_tar(folder, fill).read(0))


@pytest.fixture(scope="module")
def documents(items):
    return [item.document for item in items if item.document]


def test_a_sample_is_all_members_with_the_same_stem(documents):
    assert [d.id for d in documents] == ["some/0", "some/1", "some/2", "some/4"]


def test_captions_come_from_txt_before_json(documents):
    assert [d.text for d in documents] == ["zéro", "one", "this", "capitals"]


def test_captions_are_cleaned_whatever_wrote_them(tmp_path, make_tar):
    def fill(tar):
        hostile.sample(tar, "0", PNG, b"\xef\xbb\xbftile number 0\r\n")
        hostile.member(tar, "1.png", PNG)
        hostile.member(tar, "1.json", b'\xef\xbb\xbf{"caption": "  tile\\nnumber 1"}\r\n')
        hostile.member(tar, unicodedata.normalize("NFD", "é.png"), PNG)
        hostile.member(tar, unicodedata.normalize("NFC", "é.txt"), b"one sample")

    found = [item.document for item in make_tar(tmp_path, fill).read(0)]
    assert [d.text for d in found] == ["tile number 0", "tile number 1", "one sample"]
    assert found[2].id == unicodedata.normalize("NFC", "é")


def test_url_and_license_come_from_json(documents):
    _, one, two, _ = documents
    assert (one.url, one.license, two.license) == ("http://a/b", "CC0", "MIT")


def test_the_image_keeps_its_pixels(documents):
    np.testing.assert_array_equal(documents[0].image, hostile.pixels())


def test_a_sample_without_an_image_or_a_caption_is_rejected(items):
    rejected = [(item.reject.name, item.reject.reason) for item in items if item.reject]
    assert rejected == [("some/3.v2", "empty-caption"), ("some/5", "no-picture")]


def test_nothing_is_extracted(items, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["a.tar"]


def read(folder, make_tar, fill):
    """Ids of the documents, and names of the rejects."""
    items = list(make_tar(folder, fill).read(0))
    return (
        [item.document.id for item in items if item.document],
        [item.reject.name for item in items if item.reject],
    )


def test_pictures_and_captions_that_share_dots_in_their_names_are_samples(tmp_path, make_tar):
    def fill(tar):
        for i in range(4, 8):
            hostile.sample(tar, f"photo v1.{i}", PNG, b"caption")
            hostile.member(tar, f"photo v1.{i}.npy", bytes(100))
        hostile.member(tar, "photo v1.8.png", PNG)
        hostile.sample(tar, "photo v1.9", b"damaged", b"caption")
        hostile.sample(tar, "photo v2", PNG, b"caption")
        hostile.sample(tar, "photo v2.1", PNG, b"caption")

    ids, rejects = read(tmp_path, make_tar, fill)
    assert sorted(ids) == [f"photo v1.{i}" for i in range(4, 8)] + ["photo v2", "photo v2.1"]
    assert sorted(rejects) == ["photo v1.8", "photo v1.9"]


def test_further_fields_of_a_sample_are_neither_read_nor_rejected(tmp_path, make_tar):
    def fill(tar):
        for i in range(3):
            hostile.member(tar, f"{i}.depth.png", PNG)
            hostile.member(tar, f"{i}.png", PNG)
            hostile.member(tar, f"{i}.mask.png", PNG)
            hostile.member(tar, f"{i}.mask.json", b"{}")
            hostile.member(tar, f"{i}.de.txt", b"Beschriftung")
            hostile.member(tar, f"{i}.txt", b"caption")

    assert read(tmp_path, make_tar, fill) == (["0", "1", "2"], [])


def test_files_of_the_system_and_about_the_samples_are_no_samples(tmp_path, make_tar):
    """A Mac's tar holds a shadow before each member."""

    def fill(tar):
        for name in ("LICENSE", "README.md", "README.txt", ".DS_Store", "__meta__/info.json"):
            hostile.member(tar, name, b"text")
        hostile.member(tar, "._.", b"shadow")
        for i in range(3):
            for ending, data in (("png", PNG), ("txt", b"caption")):
                hostile.member(tar, f"._{i}.{ending}", b"shadow")
                hostile.member(tar, f"{i}.{ending}", data)
        hostile.member(tar, "3.txt", b"a lost caption")
        hostile.sample(tar, "readme", PNG, b"a picture of that name")
        hostile.member(tar, "__MACOSX/0.png", PNG)

    assert read(tmp_path, make_tar, fill) == (["0", "1", "2", "readme"], ["3"])


def test_keys_of_several_tars_follow_the_tars_name(tmp_path, make_tar):
    data = archive(tmp_path, make_tar, "0", "1")
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path in paths:
        path.write_bytes(data)
    items = list(webdataset.TarSource(paths).read(0))
    assert [item.document.id for item in items] == ["a/0", "a/1", "b/0", "b/1"]


def archive(folder, make_tar, *keys):
    (folder / "one").mkdir(exist_ok=True)
    make_tar(folder / "one", lambda tar: [hostile.sample(tar, key, PNG, b"one") for key in keys])
    return (folder / "one" / "a.tar").read_bytes()


@pytest.mark.parametrize("padding", [0, 512, 3 << 20])
def test_joined_archives_are_read_to_the_end(tmp_path, make_tar, padding):
    """As by `cat a.tar b.tar`; each ends with blocks of zeros."""
    parts = [archive(tmp_path, make_tar, *keys) for keys in ("ab", "cd", "")]
    (tmp_path / "joined.tar").write_bytes((bytes(padding)).join([*parts, parts[0]]))
    source = webdataset.TarSource([tmp_path / "joined.tar"])
    items = list(source.read(0))
    assert [item.document.id for item in items] == list("abcdab")
    for i, item in enumerate(items):
        later = [other.document.id for other in source.read(item.position)]
        assert later == list("abcdab")[i + 1 :]


def test_zeros_that_take_no_space_are_skipped_at_once(tmp_path, make_tar):
    """A terabyte between two archives."""
    with (tmp_path / "sparse.tar").open("wb") as file:
        file.write(archive(tmp_path, make_tar, "a"))
        try:
            file.seek(1 << 40)
            file.write(archive(tmp_path, make_tar, "b"))
            holes = os.lseek(file.fileno(), 1 << 30, os.SEEK_DATA) > 1 << 30
        except OSError:
            holes = False
    if not holes:
        pytest.skip("this disk has no sparse files")
    items = webdataset.TarSource([tmp_path / "sparse.tar"]).read(0)
    assert [item.document.id for item in items] == ["a", "b"]


def test_bytes_behind_the_end_are_noticed(tmp_path, make_tar):
    data = archive(tmp_path, make_tar, "a", "b") + b"lost" * 1000
    (tmp_path / "b.tar").write_bytes(data)
    *documents, last = webdataset.TarSource([tmp_path / "b.tar"]).read(0)
    assert [item.document.id for item in documents] == ["a", "b"]
    assert (last.reject.name, last.reject.reason) == ("b.tar", "damaged-tar")
    assert "behind its end" in last.reject.detail
