"""A TFDS dataset in ArrayRecord form, made by the test without TensorFlow, read without it."""

import json
import pathlib

import fresh_python
import hostile
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_generated_pb2, tf_feature_generated_pb2

from rag_mm.core.errors import UserError
from rag_mm.data import array_records, open_documents

PROGRAMS = pathlib.Path(__file__).parent / "programs"


def example(values: dict) -> bytes:
    features = {}
    for name, value in values.items():
        kind = tf_feature_generated_pb2.Feature()
        if isinstance(value, bytes):
            kind.bytes_list.value.append(value)
        else:
            kind.int64_list.value.append(value)
        features[name] = kind
    wrapped = tf_feature_generated_pb2.Features(feature=features)
    return tf_example_generated_pb2.Example(features=wrapped).SerializeToString()


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "pics" / "1.0.0"
    folder.mkdir(parents=True)
    path = folder / "pics-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    pictures = [hostile.encoded(hostile.pixels(i)) for i in range(3)]
    pictures += [hostile.png_claiming(60_000, 60_000), b"no picture"]
    size = 0
    for i, picture in enumerate(pictures):
        data = example({"image": picture, "caption": f"pic {i}".encode(), "label": i % 2})
        writer.write(data)
        size += len(data)
    writer.close()
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "caption": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    tfds.features.FeaturesDict(features).save_config(str(folder))
    split = {"name": "train", "shardLengths": ["5"], "numBytes": str(size)}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "pics", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_are_checked_before_they_are_decoded(dataset):
    found = list(open_documents.open_documents(f"tfds:{dataset}:train").read(0))
    good = [item.document for item in found if item.document]
    assert [d.id for d in good] == [f"1.0.0-train-{i}" for i in range(3)]
    assert [d.text for d in good] == ["pic 0", "pic 1", "pic 2"]
    np.testing.assert_array_equal(good[2].image, hostile.pixels(2))
    assert [item.reject.reason for item in found[3:]] == ["too-many-pixels", "not-a-picture"]
    labels = array_records.TfdsSource(str(dataset), "train[:2]", caption="label")
    assert [item.document.text for item in labels.read(0)] == ["cat", "dog"]
    assert len(list(labels.read(1))) == 1


def test_what_is_no_dataset(dataset):
    with pytest.raises(UserError, match="write tfds:"):
        open_documents.open_documents(str(dataset))
    with pytest.raises(UserError, match="TFDS cannot read .* split 'test'"):
        open_documents.open_documents(f"tfds:{dataset}:test")


def test_no_tensorflow_is_imported(dataset):
    done = fresh_python.run(PROGRAMS / "read_documents.py", f"tfds:{dataset}:train[:2]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "False"]
