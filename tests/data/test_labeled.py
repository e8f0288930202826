"""Pictures with class names: folders of folders, and TFDS datasets as TFDS itself would lay them down."""

import json

import hostile
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from test_tfds import example

from rag_mm.core.errors import UserError
from rag_mm.data import labeled

BIRDS = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]


@pytest.fixture
def folder(tmp_path):
    for name in ("red_apple", "green pear"):
        (tmp_path / name).mkdir()
        for i in range(2):
            PIL.Image.fromarray(hostile.pixels(i)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "red_apple" / "notes.txt").write_text("no picture")
    return tmp_path


def test_a_folder_of_class_folders(folder):
    found = labeled.LabeledFolder(folder)
    assert found.class_names == ("green pear", "red apple")
    read = list(found.read())
    assert [number for _, number in read] == [0, 0, 1, 1]
    np.testing.assert_array_equal(read[1][0], hostile.pixels(1))


def test_a_bad_picture_is_listed_and_passed_over(folder):
    (folder / "red_apple" / "a.jpg").write_bytes(b"no picture")
    found = labeled.LabeledFolder(folder)
    for _ in range(2):  # A second reading names it no second time.
        assert len(list(found.read())) == 4
    ((name, reason),) = found.rejects
    assert name.endswith("a.jpg") and "not a JPEG, PNG or WebP" in reason


def test_files_that_a_mac_leaves_are_neither_classes_nor_images(folder):
    for name in ("__MACOSX/0.png", "__MACOSX/red_apple/0.png", "red_apple/._0.png", ".x/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"shadow")
    found = labeled.LabeledFolder(folder)
    assert found.class_names == ("green pear", "red apple")
    assert len(list(found.read())) == 4 and not found.rejects


@pytest.mark.parametrize(("name", "says"), [("red apple", "another class"), ("003.", "empty")])
def test_classes_that_read_alike_are_refused(folder, name, says):
    (folder / name).mkdir()
    (folder / "red_apple" / "0.png").rename(folder / name / "0.png")
    with pytest.raises(UserError, match=says):
        labeled.LabeledFolder(folder)


def test_what_is_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="not a folder of class folders"):
        labeled.LabeledFolder(tmp_path / "nothing")
    with pytest.raises(UserError, match="CLASS/image.jpg"):
        labeled.LabeledFolder(tmp_path)


@pytest.fixture
def mocked(tmp_path, monkeypatch):
    """Puts a dataset of three pictures in the place of whatever is asked for by name."""
    pictures = [hostile.encoded(hostile.pixels(i)) for i in range(3)] + [b"no picture"]

    def build(name: str):
        folder = tmp_path / name / "1.0.0"
        folder.mkdir(parents=True)
        path = folder / f"{name}-test.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        records = [example({"image": p, "label": i % 2}) for i, p in enumerate(pictures)]
        for record in records:
            writer.write(record)
        writer.close()
        names = BIRDS if name == "caltech_birds2011" else ["AM General Hummer SUV 2000", "Audi A5"]
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=names),
        }
        tfds.features.FeaturesDict(features).save_config(str(folder))
        size = sum(map(len, records))
        split = {"name": "test", "shardLengths": ["4"], "numBytes": str(size)}
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        return tfds.builder_from_directory(folder)

    monkeypatch.setattr(tfds, "builder", build)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("caltech_birds2011", ("Black footed Albatross", "Laysan Albatross")),
        ("cars196", ("AM General Hummer SUV 2000", "Audi A5")),
        ("some_other:test", ("AM General Hummer SUV 2000", "Audi A5")),
    ],
)
def test_datasets_by_name(mocked, spec, names):
    found = labeled.open_dataset(spec)
    assert found.class_names == names
    read = list(found.read())
    assert [number for _, number in read] == [0, 1, 0]
    np.testing.assert_array_equal(read[2][0], hostile.pixels(2))
    assert [name for name, _ in found.rejects] == [f"{spec.split(':')[0]}-test-3"]


@pytest.mark.parametrize("folder", ["birds:2011", "plain"])
def test_a_folder_may_have_a_colon_in_its_name(mocked, tmp_path, monkeypatch, folder):
    asked = []
    monkeypatch.setattr(labeled, "LabeledTfds", lambda *names: asked.append(names))
    (tmp_path / folder).mkdir()
    labeled.open_dataset(f"{tmp_path}/{folder}")
    labeled.open_dataset(f"{tmp_path}/{folder}:train[:10]")
    assert asked == [(f"{tmp_path}/{folder}", "test"), (f"{tmp_path}/{folder}", "train[:10]")]


def test_the_named_loaders_are_the_generic_route(mocked):
    assert labeled.cars196("test").class_names == ("AM General Hummer SUV 2000", "Audi A5")


def test_a_dataset_without_that_label(mocked):
    with pytest.raises(UserError, match="no class label 'breed'; it has image, label"):
        labeled.LabeledTfds("cars196", "test", label="breed")


def test_a_split_that_is_not_there(mocked):
    with pytest.raises(UserError, match="TFDS cannot read 'cars196', split 'train'"):
        labeled.open_dataset("cars196:train")


def test_names_become_readable():
    assert labeled.readable("001.Black_footed_Albatross") == "Black footed Albatross"
    assert labeled.readable("Audi  A5") == "Audi A5"
