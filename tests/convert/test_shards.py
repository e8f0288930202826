"""Safetensors: read as the library reads them, written as it writes them, and refused when they lie."""

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


def test_reads_what_the_library_wrote(path):
    specs = shards.read_header(path)
    assert set(specs) == set(TENSORS)
    for name, array in TENSORS.items():
        found = shards.read(specs[name])
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype


def test_a_layer_is_one_range_of_bytes(path):
    spec = shards.layer_of(shards.read_header(path)["a"], 1)
    np.testing.assert_array_equal(shards.read(spec), TENSORS["a"][1])


@pytest.mark.parametrize("max_bytes", [1, 30, 1000])
def test_the_library_reads_what_is_written(tmp_path, max_bytes):
    shapes = {name: (array.dtype, array.shape) for name, array in TENSORS.items()}
    done = []
    names = shards.write_folder(tmp_path, shapes, TENSORS.__getitem__, max_bytes, done.append)
    assert done[-1] == sum(array.nbytes for array in TENSORS.values())
    found = {}
    for name in names:
        found |= safetensors.numpy.load_file(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 1000
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)
    assert len(names) == {1: 3, 30: 2, 1000: 1}[max_bytes]
    assert set(shards.open_folder(epath.Path(tmp_path))) == set(TENSORS)


def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)  # with NaNs, infinities and subnormals
    array = bits.view(ml_dtypes.bfloat16)
    shards.write_folder(tmp_path, {"x": (array.dtype, array.shape)}, lambda _: array, 1 << 20)
    (spec,) = shards.open_folder(epath.Path(tmp_path)).values()
    np.testing.assert_array_equal(shards.read(spec).view(np.uint16), bits)


def test_a_file_cut_short_is_refused_before_a_tensor_is_read(path):
    data = path.read_bytes()
    for length in (0, 5, 40, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="cut short"):
            shards.read_header(path)


def test_bytes_behind_the_last_tensor_are_refused(path):
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="goes on behind"):
        shards.read_header(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(data_offsets=[0, 8]), "has 8 bytes, not 24"),
        (dict(data_offsets=[8, 32]), "overlaps another or leaves a gap"),
        (dict(shape=[-2, -3]), "a size that is none"),
        (dict(shape=[2, 3.0]), "a size that is none"),
        (dict(dtype="F4"), "dtype 'F4', which is unknown"),
        (dict(shape=None), "no readable safetensors header"),
    ],
)
def test_a_header_that_contradicts_the_file_is_refused(path, change, reason):
    header, body = header_of(path)
    header["a"] |= change
    rewrite(path, header, body)
    with pytest.raises(UserError, match=reason):
        shards.read_header(path)


@pytest.mark.parametrize(
    "data", [b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]", b"\x03" + b"\0" * 7 + b"{}}"]
)
def test_what_is_no_header_is_refused(path, data):
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
        ("../model.safetensors", "no plain file name"),
        ("/etc/passwd", "no plain file name"),
        ("a\\b.safetensors", "no plain file name"),
        (".hidden.safetensors", "no plain file name"),
        (7, "no plain file name"),
        ("pytorch_model.bin", "is a pickle file"),
        ("model.h5", "no safetensors file"),
        ("absent.safetensors", "which is not in"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, place, reason):
    folder, index = sharded(tmp_path)
    index["weight_map"]["a"] = place
    (folder / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=reason):
        shards.open_folder(folder)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    folder, index = sharded(tmp_path)
    places = index["weight_map"]
    for spoilt, reason in (
        (places | {"d": places["a"]}, "does not hold d"),
        (places | {"a": places["b"]}, "otherwise|does not hold a"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        (folder / shards.INDEX).write_text(json.dumps({"weight_map": spoilt}))
        with pytest.raises(UserError, match=reason):
            shards.open_folder(folder)


def test_a_folder_of_pickles_is_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle file"):
        shards.open_folder(epath.Path(tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        shards.open_folder(epath.Path(tmp_path / "absent"))
