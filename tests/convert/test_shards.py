"""Safetensors: compatible with the library in both directions; inconsistent files are rejected."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from rag_mm.convert import shards
from rag_mm.core.errors import UserError

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.array(7, np.float32),
}


@pytest.fixture
def path(tmp_path):
    file = epath.Path(tmp_path / "model.safetensors")
    file.write_bytes(safetensors.numpy.save(TENSORS))
    return file


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_reads_files_of_the_library(path):
    specs = shards.read_header(path)
    assert set(specs) == set(TENSORS)
    for name, array in TENSORS.items():
        tensor = shards.read_tensor(specs[name])
        np.testing.assert_array_equal(tensor, array)
        assert tensor.dtype == array.dtype


def test_a_layer_is_a_contiguous_range_of_bytes(path):
    spec = shards.layer_spec(shards.read_header(path)["a"], 1)
    np.testing.assert_array_equal(shards.read_tensor(spec), TENSORS["a"][1])


@pytest.mark.parametrize("max_bytes", [1, 30, 1000])
def test_the_library_reads_our_files(tmp_path, max_bytes):
    shapes = {name: (array.dtype, array.shape) for name, array in TENSORS.items()}
    progress = []
    names = shards.write_folder(tmp_path, shapes, TENSORS.__getitem__, max_bytes, progress.append)
    assert progress[-1] == sum(array.nbytes for array in TENSORS.values())
    tensors = {}
    for name in names:
        tensors |= safetensors.numpy.load_file(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 1000
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], array)
    assert len(names) == {1: 3, 30: 2, 1000: 1}[max_bytes]
    assert set(shards.open_folder(epath.Path(tmp_path))) == set(TENSORS)


def test_bfloat16_round_trip_is_exact(tmp_path):
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)  # with NaNs, infinities and subnormals
    array = bits.view(ml_dtypes.bfloat16)
    shards.write_folder(tmp_path, {"x": (array.dtype, array.shape)}, lambda _: array, 1 << 20)
    (spec,) = shards.open_folder(epath.Path(tmp_path)).values()
    np.testing.assert_array_equal(shards.read_tensor(spec).view(np.uint16), bits)


def test_a_truncated_file_is_rejected_before_a_tensor_is_read(path):
    data = path.read_bytes()
    for length in (0, 5, 40, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="is truncated"):
            shards.read_header(path)


def test_bytes_after_the_last_tensor_are_rejected(path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="extra bytes after"):
        shards.read_header(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(data_offsets=[0, 8]), "has 8 bytes, not 24"),
        (dict(data_offsets=[8, 32]), "overlaps another or follows a gap"),
        (dict(shape=[-2, -3]), "has an invalid size"),
        (dict(shape=[2, 3.0]), "has an invalid size"),
        (dict(dtype="F4"), "unknown dtype 'F4'"),
        (dict(shape=None), "no valid safetensors header"),
    ],
)
def test_a_header_that_does_not_match_the_file_is_rejected(path, change, reason):
    header, body = header_of(path)
    header["a"] |= change
    rewrite(path, header, body)
    with pytest.raises(UserError, match=reason):
        shards.read_header(path)


@pytest.mark.parametrize(
    "data", [b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]", b"\x03" + b"\0" * 7 + b"{}}"]
)
def test_an_invalid_header_is_rejected(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError):
        shards.read_header(path)


def sharded(tmp_path):
    shapes = {name: (array.dtype, array.shape) for name, array in TENSORS.items()}
    shards.write_folder(tmp_path, shapes, TENSORS.__getitem__, 1)
    return epath.Path(tmp_path), json.loads((tmp_path / shards.INDEX).read_text())


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("../model.safetensors", "not a plain file name"),
        ("/etc/passwd", "not a plain file name"),
        ("a\\b.safetensors", "not a plain file name"),
        (".hidden.safetensors", "not a plain file name"),
        (7, "not a plain file name"),
        ("pytorch_model.bin", "is a pickle file"),
        ("model.h5", "not a safetensors file"),
        ("absent.safetensors", "which is not in"),
    ],
)
def test_an_index_that_names_other_files_is_rejected(tmp_path, place, reason):
    folder, index = sharded(tmp_path)
    index["weight_map"]["a"] = place
    (folder / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=reason):
        shards.open_folder(folder)


def test_an_index_that_does_not_match_its_files_is_rejected(tmp_path):
    folder, index = sharded(tmp_path)
    places = index["weight_map"]
    for weight_map, reason in (
        (places | {"d": places["a"]}, "does not hold d"),
        (places | {"a": places["b"]}, "does not map it there|does not hold a"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        (folder / shards.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=reason):
            shards.open_folder(folder)


def test_a_folder_of_pickles_is_rejected_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle file"):
        shards.open_folder(epath.Path(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        shards.open_folder(epath.Path(tmp_path / "absent"))
