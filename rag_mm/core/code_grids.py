"""Where the codes of an image lie.

An image has one or more grids of codes, coarse to fine; the last is the finest. Codes are ordered grid by
grid, in raster order within a grid. A code of the finest grid stands for one patch of pixels. The codes of
a coarser grid are further codes of some of these patches (SPAE, Yu et al. 2023, section 3.2), so every code
lies in exactly one patch: where the finest grid is `stride` times as large, the code at row i lies at row
i * stride + stride // 2 of the finest grid, likewise for columns.
"""

from typing import NamedTuple

import numpy as np

from rag_mm.core.errors import UserError

Grids = tuple[tuple[int, int], ...]  # (rows, columns) of each grid, coarse to fine


class Locations(NamedTuple):
    """Where each of an image's N codes lies; all int32 [N].

    Attributes:
        grid: number of its grid, from 0.
        row, column: its place in its own grid.
        patch_row, patch_column: its place in the finest grid.
    """

    grid: np.ndarray
    row: np.ndarray
    column: np.ndarray
    patch_row: np.ndarray
    patch_column: np.ndarray


def num_codes(grids: Grids) -> int:
    """Number of codes of an image."""
    return sum(rows * columns for rows, columns in grids)


def ends(grids: Grids) -> list[int]:
    """For each grid, the number of codes of all grids up to it."""
    return [num_codes(grids[: number + 1]) for number in range(len(grids))]


def patches(count: int, finest: int) -> slice:
    """The rows of the finest grid, of `finest` rows, in which the `count` rows of a grid lie; so for columns.

    SPAE's P(l) counted from zero: h' * i - ceil(h' / 2) for i = 1..count with h' = finest / count.

    Raises:
        ValueError: `count` does not divide `finest`.
    """
    if count < 1 or finest % count:
        raise ValueError(f"a grid of {count} rows does not divide the finest grid of {finest} rows")
    stride = finest // count
    return slice(stride // 2, None, stride)


def locate(grids: Grids) -> Locations:
    """Where each code lies, in the order of the codes.

    Raises:
        ValueError: a grid does not divide the finest one.
    """
    finest_rows, finest_columns = grids[-1]
    found = []
    for number, (rows, columns) in enumerate(grids):
        row, column = np.divmod(np.arange(rows * columns), columns)
        patch_row = np.arange(finest_rows)[patches(rows, finest_rows)][row]
        patch_column = np.arange(finest_columns)[patches(columns, finest_columns)][column]
        found.append([np.full_like(row, number), row, column, patch_row, patch_column])
    return Locations(*np.concatenate(found, axis=1).astype(np.int32))


def mask_of_pixels(pixels: np.ndarray, grids: Grids) -> np.ndarray:
    """The codes in whose patch at least one pixel is True: bool [N].

    Args:
        pixels: bool [H, W], for instance where an image shows an entity.
        grids: the image's grids; the finest divides the image.

    Raises:
        ValueError: it does not.
    """
    (height, width), (rows, columns) = pixels.shape, grids[-1]
    if height % rows or width % columns:
        raise ValueError(f"a grid of {rows} x {columns} does not divide {height} x {width} pixels")
    blocks = pixels.reshape(rows, height // rows, columns, width // columns)
    covered, at = np.asarray(blocks.any(axis=(1, 3))), locate(grids)
    return covered[at.patch_row, at.patch_column]


def ranges_of_rows(grids: Grids, height: int, start: int, end: int) -> list[tuple[int, int]]:
    """The codes of the rows [start, end) of pixels, as ranges (first code, last code + 1).

    The ranges are ascending and disjoint, one for each grid that has codes there; coarse grids may have none.

    Args:
        grids: the image's grids.
        height: of the image in pixels, a multiple of the rows of the finest grid.
        start, end: multiples of a patch's height.

    Raises:
        UserError: `start` and `end` are not, or are no rows of the image.
    """
    patch = height // grids[-1][0]
    if not 0 <= start < end <= height or start % patch or end % patch:
        raise UserError(
            f"The rows {start}:{end} are not a band of an image of {height} rows; give multiples of {patch}, "
            "the first less than the second."
        )
    at = locate(grids)
    inside = (at.patch_row >= start // patch) & (at.patch_row < end // patch)
    codes = (np.flatnonzero(inside & (at.grid == number)) for number in range(len(grids)))
    # Whole rows in raster order are contiguous.
    return [(int(part[0]), int(part[-1]) + 1) for part in codes if part.size]
