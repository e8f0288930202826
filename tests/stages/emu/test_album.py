"""Pictures are numbered once, and their arrays are written and read file by file."""

import numpy as np
import pytest
from etils import epath

from rag_mm.stages.emu import album


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(album, "PER_FILE", 4)
    monkeypatch.setattr(album, "_AT_ONCE", 3)


def draw(value):
    return lambda: np.full((2, 2, 3), value, np.uint8)


def make(count):
    made = album.Album()
    for i in range(count):
        assert made.add(("key", i), draw(i)) == i
    return made


def test_a_key_has_one_number():
    made = make(3)
    assert made.add(("key", 1), draw(9)) == 1 and len(made) == 3
    assert (made.pixels(1) == 1).all()


def encode(pixels):
    return pixels[:, 0, 0, 0].astype(np.float16)[:, None] * np.ones((1, 5), np.float16)


def test_arrays_of_all_pictures_are_taken_by_number(tmp_path, small_files):
    album.write(make(10), epath.Path(tmp_path), encode)
    opened = album.PictureArrays.open(epath.Path(tmp_path))
    assert len(opened) == 10 and opened.shape == (5,)
    taken = opened.take(np.array([[9, 0], [-1, 4]]))
    assert taken.dtype == np.float16
    np.testing.assert_array_equal(taken[..., 0], [[9, 0], [0, 4]])


def test_an_interrupted_stage_keeps_the_files_it_has(tmp_path, small_files):
    folder, calls = epath.Path(tmp_path), []

    def fail_late(pixels):
        calls.append(len(pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        album.write(make(10), folder, fail_late)
    before = (folder / "00000.npy").stat()
    album.write(make(10), folder, encode)
    assert (folder / "00000.npy").stat() == before
    taken = album.PictureArrays.open(folder).take(np.arange(10))
    np.testing.assert_array_equal(taken[:, 0], np.arange(10))
