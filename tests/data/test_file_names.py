"""Names of files: which are no samples, and what id a document gets."""

import pathlib
import unicodedata

import pytest

from rag_mm.data import file_names


@pytest.mark.parametrize(
    "path",
    [
        "._0.jpg", "a/._0.jpg", "._.", ".DS_Store", "a/.DS_Store", ".jpg", "Thumbs.db", "desktop.ini",
        "Icon\r", "__MACOSX/0.jpg", "__MACOSX/a/._0.jpg", "__meta__/info.json", "a/@eaDir/0.jpg",
    ],
)  # fmt: skip
def test_files_that_a_system_leaves(path):
    assert file_names.is_system_file(path)


@pytest.mark.parametrize(
    "path",
    ["0.jpg", "./0.jpg", "a/0.jpg", ".data/0.jpg", "__0.jpg", "a__b__/0.jpg", "_/0.jpg", "..", ""],
)
def test_files_of_the_user(path):
    assert not file_names.is_system_file(path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("LICENSE", True), ("a/README.md", True), ("readme.txt", True), ("stats.json", True),
        ("0.csv", True), ("0", True), ("index.html", True), ("0.txt", False), ("0.json", False),
        ("0.svg", False), ("0.npy", False), ("drawing.gif", False),
    ],
)  # fmt: skip
def test_files_about_the_samples(path, expected):
    assert file_names.is_about_samples(path) == expected


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (["0.png", "1.v2.png"], ["0", "1.v2"]),
        (["cat/0.png", "dog/0.png", "0.png"], ["cat/0", "dog/0", "0"]),
        (["0.png", "0.webp", "0.jpg"], ["0", "0.webp", "0.jpg"]),
        (["0.png", "./0.png", "0.webp", "0.webp"], ["0", "0", "0.webp", "0.webp"]),
        ([unicodedata.normalize("NFD", "é.png")], [unicodedata.normalize("NFC", "é")]),
        (["a", " b.png"], ["a", " b"]),
    ],
)
def test_ids_are_paths_without_endings(paths, ids):
    assert file_names.ids_of_paths(paths) == ids


@pytest.mark.parametrize(
    ("paths", "prefixes"),
    [
        (["a.tar"], [""]),
        (["x/a.tar", "x/b.TAR"], ["a/", "b/"]),
        (["x/a.tar", "y/a.tar"], ["x/a/", "y/a/"]),
        (["00.1.tar", "00.2.tar"], ["00.1/", "00.2/"]),
    ],
)
def test_several_tars_precede_their_keys(paths, prefixes):
    assert file_names.prefixes_of_shards([pathlib.Path(path) for path in paths]) == prefixes
