"""Samples of a WebDataset tar: which members make one document, and what its fields are."""

import json
import tarfile

import hostile
import numpy as np
import pytest

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

    return list(make_tar(folder, fill).read(0))


@pytest.fixture(scope="module")
def documents(items):
    return [item.document for item in items if item.document]


def test_a_sample_is_all_members_with_the_same_stem(documents):
    assert [d.id for d in documents] == ["some/0", "some/1", "some/2", "some/4"]


def test_captions_come_from_txt_before_json(documents):
    assert [d.text for d in documents] == ["zéro", "one", "this", "capitals"]


def test_url_and_license_come_from_json(documents):
    _, one, two, _ = documents
    assert (one.url, one.license, two.license) == ("http://a/b", "CC0", "MIT")


def test_the_image_keeps_its_pixels(documents):
    np.testing.assert_array_equal(documents[0].image, hostile.pixels())


def test_a_sample_without_an_image_is_rejected(items):
    rejected = [(item.reject.name, item.reject.reason) for item in items if item.reject]
    assert rejected == [("some/3", "no-picture")]


def test_nothing_is_extracted(items, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["a.tar"]
