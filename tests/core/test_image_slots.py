"""Sequences with images: their ids, their slots, and what is refused on the host."""

import numpy as np
import pytest

from rag_mm.core import image_slots
from rag_mm.core.errors import UserError

IDS = image_slots.SlotTokens(1, 2, 10, 11, 12, 13)


def test_ids_and_slots_of_a_written_sequence():
    row = image_slots.interleave([[5, 6], None, [7], None], IDS, 2, has_end=True)
    assert row.tokens.tolist() == [1, 5, 6, 11, 13, 13, 12, 7, 11, 13, 13, 12, 2]
    assert row.slot.tolist() == [-1, -1, -1, -1, 0, 1, -1, -1, -1, 2, 3, -1, -1]
    prompt = image_slots.interleave([[5]], IDS, 2, starts_image=True)
    assert prompt.tokens.tolist() == [1, 5, 11] and prompt.slot.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(("num_images", "words"), [(3, "3 images"), (1, "1 images")])
def test_other_images_than_slots_are_refused(num_images, words):
    row = image_slots.interleave([None, [7], None], IDS, 2)
    image_slots.check(*row, 2, IDS, 2)
    with pytest.raises(UserError, match=f"{words} of 2 vectors do not fit 4 slots"):
        image_slots.check(*row, num_images, IDS, 2)


def test_slots_that_are_not_the_ids_or_not_each_once_are_refused():
    tokens, slot = image_slots.interleave([None, None], IDS, 2)
    with pytest.raises(UserError, match="do not agree"):
        image_slots.check(tokens, np.roll(slot, 1), 2, IDS, 2)
    with pytest.raises(UserError, match="each once"):
        image_slots.check(tokens, np.minimum(slot, 2), 2, IDS, 2)


def test_ids_that_are_one_are_refused():
    with pytest.raises(ValueError, match="one id"):
        image_slots.SlotTokens(slot=1)
