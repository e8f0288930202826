"""The rules of image decoding: every code has an example, and a cut-off file is rejected."""

import hostile
import numpy as np
import PIL.Image
import pytest

from rag_mm.data import image_decoding


def test_every_note_has_an_example():
    notes = {note for _, expected in hostile.READ.values() for note in expected}
    assert notes == set(image_decoding.NOTES)


def test_every_reject_reason_has_an_example():
    reasons = {reason for _, reason in hostile.REFUSED.values()}
    assert reasons == set(image_decoding.REJECT_REASONS) - {"too-many-bytes"}


def test_eight_bytes_of_an_image_are_truncated():
    """`decode` takes only bytes, so that the length is known before anything is read."""
    with pytest.raises(image_decoding.BadImage) as caught:
        image_decoding.decode(hostile.encoded(hostile.pixels())[:8])
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("name", hostile.ODD_METADATA)
def test_odd_metadata_keeps_no_pixel_from_being_read(name):
    """As browsers, libpng and OpenCV read all of these."""
    data, notes = hostile.ODD_METADATA[name]
    image = image_decoding.decode(data, name.rpartition(".")[2])
    assert set(image.notes) == notes
    np.testing.assert_array_equal(image.pixels, hostile.pixels())


def test_an_image_of_odd_metadata_is_still_turned():
    data, _ = hostile.READ["turned_long_text.png"]
    turned = np.rot90(hostile.pixels(), -1)
    np.testing.assert_array_equal(image_decoding.decode(data).pixels, turned)


def test_what_is_noted_as_transparent_is_white():
    """Values of 16 bits, in gray and in color; only the first pixel is transparent."""
    gray = hostile.pixels()[:, :, 0].astype(np.uint16) * 256 + np.arange(9, dtype=np.uint16)
    gray_file = hostile.encoded(PIL.Image.fromarray(gray), transparency=int(gray[0, 0]))
    gray_pixels = np.repeat(hostile.pixels()[:, :, :1], 3, axis=2)
    color_file, color_pixels = hostile.READ["deep_hole.png"][0], hostile.pixels()
    for data, expected in ((gray_file, gray_pixels), (color_file, color_pixels)):
        image = image_decoding.decode(data)
        assert set(image.notes) == {"16-bit", "alpha"}
        expected[0, 0] = 255
        np.testing.assert_array_equal(image.pixels, expected)


def test_damaged_pixels_are_no_matter_of_metadata():
    """A wrong checksum of a text is forgiven, one of the pixels beside it is not."""
    data = hostile.ODD_METADATA["checksum.png"][0]
    place = data.index(b"IDAT") + 12
    flipped = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
    with pytest.raises(image_decoding.BadImage) as caught:
        image_decoding.decode(flipped)
    assert caught.value.reason == "damaged"
