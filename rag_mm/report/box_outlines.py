"""Boxes drawn over an image, enlarged so that their lines hide little of it."""

from collections.abc import Iterable

import numpy as np

COLOR = (230, 0, 126)  # No background of the scenes, and visible on all.
_SIDE = 96


def outline(image: np.ndarray, boxes: Iterable[tuple[int, int, int, int]]) -> np.ndarray:
    """An image with the outlines of boxes, one pixel wide after it is enlarged to about 96 pixels.

    Args:
        image: uint8 [H, W, 3].
        boxes: left, top, right and bottom of each in pixels of the image, the latter two exclusive.

    Returns:
        Uint8 [zH, zW, 3], z an integer of at least 1.

    Raises:
        ValueError: a box is empty or reaches outside.
    """
    height, width = image.shape[:2]
    zoom = max(1, _SIDE // max(height, width))
    drawn = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"the box {left} {top} {right} {bottom} is not in {width} x {height}")
        rows, columns = slice(top * zoom, bottom * zoom), slice(left * zoom, right * zoom)
        for row in (rows.start, rows.stop - 1):
            drawn[row, columns] = COLOR
        for column in (columns.start, columns.stop - 1):
            drawn[rows, column] = COLOR
    return drawn
