"""Outlines of boxes over an enlarged image."""

import numpy as np
import pytest

from rag_mm.report import box_outlines


def test_lines_are_at_the_edges_and_the_image_inside():
    image = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    drawn = box_outlines.outline(image, [(8, 0, 32, 24)])
    assert drawn.shape == (96, 96, 3)
    is_line = (drawn == box_outlines.COLOR).all(-1)
    rows, columns = np.nonzero(is_line)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 71, 24, 95)
    assert is_line.sum() == 4 * 72 - 4
    enlarged = image.repeat(3, 0).repeat(3, 1)
    assert (drawn[~is_line] == enlarged[~is_line]).all()


@pytest.mark.parametrize("box", [(0, 0, 9, 4), (2, 0, 2, 4), (-1, 0, 4, 4)])
def test_a_box_that_is_not_in_the_image(box):
    with pytest.raises(ValueError, match="is not in 8 x 8"):
        box_outlines.outline(np.zeros((8, 8, 3), np.uint8), [box])
