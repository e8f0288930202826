"""Every file and caption line of a folder of unknown origin is read by a rule or rejected for a reason."""

import hostile
import numpy as np
import pytest

from rag_mm.data import image_decoding, sources

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
LINE_REASONS = [reason for reason in hostile.LINES.values() if reason != "duplicate-id"]


@pytest.fixture(scope="module")
def items(hostile_folder):
    return list(sources.FolderSource(hostile_folder).read(0))


@pytest.fixture(scope="module")
def item_of(items):
    """The item of each image of `hostile`, by file name."""
    return dict(zip(hostile.IMAGES, items, strict=False))


def test_items_are_numbered_from_one(items):
    assert [item.position for item in items] == list(range(1, len(items) + 1))


@pytest.mark.parametrize("name", hostile.READ)
def test_a_readable_image_is_a_document_of_rgb_bytes(item_of, name):
    document = item_of[name].document
    assert document.id in (name, name.rpartition(".")[0])  # Two images differ in the ending alone.
    assert document.image.dtype == np.uint8


@pytest.mark.parametrize("name", hostile.READ)
def test_what_was_converted_is_noted(item_of, name):
    _, notes = hostile.READ[name]
    assert set(item_of[name].notes) == notes


@pytest.mark.parametrize("name", hostile.REFUSED)
def test_an_unreadable_image_is_rejected_by_name_and_reason(item_of, name):
    _, reason = hostile.REFUSED[name]
    item = item_of[name]
    assert item.document is None
    assert (item.reject.name, item.reject.reason) == (name, reason), item.reject


def test_a_bad_caption_line_is_rejected_with_its_reason(items):
    rejected = [item.reject.reason for item in items[len(hostile.IMAGES) :]]
    assert rejected == LINE_REASONS


def test_an_image_is_rotated_as_its_exif_data_says(item_of):
    rotated = np.rot90(hostile.pixels(), -1)
    np.testing.assert_array_equal(item_of["turned.png"].document.image, rotated)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(hostile.encoded(hostile.pixels()))
    (tmp_path / "captions.jsonl").write_bytes(hostile.line("a.png"))
    (item,) = sources.FolderSource(tmp_path).read(0)
    assert item.reject.reason == "too-many-bytes"
