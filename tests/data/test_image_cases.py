"""Every image of a table is read with its size, notes and first pixel, or rejected for its reason."""

import image_cases
import numpy as np
import pytest

from rag_mm.data import image_decoding

CASES = image_cases.cases()


def test_there_are_enough_cases():
    assert len(CASES) >= 300
    assert {case.reason for case in CASES.values()} - {""} == set(image_decoding.REJECT_REASONS) - {
        "too-many-bytes"
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", CASES)
def test_an_image_is_read_or_rejected_by_its_rule(name):
    case = CASES[name]
    if case.reason:
        with pytest.raises(image_decoding.BadImage) as caught:
            image_decoding.decode(case.data, case.ending, min_pixels=2)
        assert caught.value.reason == case.reason, str(caught.value)
        return
    image = image_decoding.decode(case.data, case.ending, min_pixels=2)
    assert (image.pixels.shape, set(image.notes)) == ((*case.size, 3), case.notes)
    actual = image.pixels[case.corner].astype(int)
    np.testing.assert_allclose(actual, case.first, rtol=0, atol=case.error)
