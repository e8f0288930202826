"""The rules of image decoding: every code has an example, and a cut-off file is rejected."""

import hostile
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
