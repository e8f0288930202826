"""Where codes lie: every code in one patch, and masks and bands of pixels as sets of codes."""

import numpy as np
import pytest

from rag_mm.core import code_grids
from rag_mm.core.errors import UserError

PYRAMIDS = [
    ((8, 8),),
    ((4, 4), (8, 8)),
    ((2, 2), (4, 4), (8, 8)),
    ((1, 1), (2, 2), (8, 8), (8, 8)),
    ((1, 2), (3, 6), (6, 12)),  # of an image that is not square
]
every_pyramid = pytest.mark.parametrize("grids", PYRAMIDS, ids=str)


def test_the_codes_of_two_grids_by_hand():
    at = code_grids.locate(((1, 2), (2, 4)))
    assert at.grid.tolist() == [0] * 2 + [1] * 8
    assert list(zip(at.row.tolist(), at.column.tolist(), strict=True)) == [
        *[(0, 0), (0, 1)],
        *[(0, 0), (0, 1), (0, 2), (0, 3)],
        *[(1, 0), (1, 1), (1, 2), (1, 3)],
    ]
    assert list(zip(at.patch_row.tolist(), at.patch_column.tolist(), strict=True))[:3] == [
        *[(1, 1), (1, 3)],
        (0, 0),
    ]
    assert code_grids.ends(((1, 2), (2, 4))) == [2, 10]


@every_pyramid
def test_each_code_lies_within_its_own_cell(grids):
    """A coarse code is one of the patches that its cell, an equal part of the image, consists of."""
    at = code_grids.locate(grids)
    assert len(at.grid) == code_grids.num_codes(grids)
    sizes = np.array(grids)[at.grid]
    np.testing.assert_array_equal(at.patch_row * sizes[:, 0] // grids[-1][0], at.row)
    np.testing.assert_array_equal(at.patch_column * sizes[:, 1] // grids[-1][1], at.column)
    places = set(zip(at.grid.tolist(), at.row.tolist(), at.column.tolist(), strict=True))
    assert len(places) == len(at.grid)


@every_pyramid
@pytest.mark.parametrize("patch", [1, 4])
def test_a_mask_of_pixels_selects_the_patches_that_it_touches(grids, patch):
    rows, columns = grids[-1]
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.2, 1.0):
        pixels = rng.random((rows * patch, columns * patch)) < share
        found = code_grids.mask_of_pixels(pixels, grids)
        for code, (row, column) in enumerate(zip(*code_grids.locate(grids)[3:], strict=True)):
            top, left = row * patch, column * patch
            assert found[code] == pixels[top : top + patch, left : left + patch].any()


@every_pyramid
def test_a_band_of_rows_is_ascending_ranges_of_exactly_its_codes(grids):
    """The same codes as the band's mask of pixels; adjacent bands share none, and all rows are all codes."""
    rows, columns = grids[-1]
    height, count = 4 * rows, code_grids.num_codes(grids)
    for start in range(rows):
        for end in range(start + 1, rows + 1):
            ranges = code_grids.ranges_of_rows(grids, height, 4 * start, 4 * end)
            edges = [edge for pair in ranges for edge in pair]
            assert edges == sorted(edges) and all(first < last for first, last in ranges)
            assert len(ranges) <= len(grids) and ranges[-1][1] <= count
            band = np.zeros((height, 4 * columns), bool)
            band[4 * start : 4 * end] = True
            inside = np.concatenate([np.arange(*pair) for pair in ranges])
            expected = np.flatnonzero(code_grids.mask_of_pixels(band, grids))
            np.testing.assert_array_equal(inside, expected)
    whole = code_grids.ranges_of_rows(grids, height, 0, height)
    assert whole == list(
        zip([0, *code_grids.ends(grids)[:-1]], code_grids.ends(grids), strict=True)
    )


@pytest.mark.parametrize("band", [(2, 8), (0, 30), (8, 8), (8, 4), (-4, 4), (28, 36)])
def test_a_band_that_cuts_patches_or_leaves_the_image_is_refused(band):
    with pytest.raises(UserError, match="of an image of 32 rows; give multiples of 4"):
        code_grids.ranges_of_rows(((4, 4), (8, 8)), 32, *band)


def test_grids_that_do_not_divide_are_programming_errors():
    with pytest.raises(ValueError, match="3 rows does not divide"):
        code_grids.locate(((3, 4), (8, 8)))
    with pytest.raises(ValueError, match="does not divide 30 x 32"):
        code_grids.mask_of_pixels(np.ones((30, 32), bool), ((8, 8),))
