"""Image preprocessing of public checkpoints: resize the shorter side, then center crop; or stretch.

The order, rounding and filter are those that the checkpoints were trained with. `image_files.fit` instead
crops first, at subpixel positions, and then resizes: images that are not square give different results.
"""

import math
from typing import Literal

import numpy as np
import PIL.Image

Filter = Literal["bilinear", "bicubic", "lanczos"]
_FILTERS = {
    "bilinear": PIL.Image.Resampling.BILINEAR,  # SigLIP 2
    "bicubic": PIL.Image.Resampling.BICUBIC,  # CLIP
    "lanczos": PIL.Image.Resampling.LANCZOS,  # Chameleon
}
_LEAST_SCALE, _MOST_SCALE, _SCALE_STEP = 1e-6, 100.0, 1e-5  # Of NaFlex.
_MAX_SCALED = 1 << 22  # Pixels of a scaled image that is made whole: 12 MiB.
_MARGIN = 4  # Pixels beyond the crop that a filter may read; the filters reach 2 and 3.


def scale_and_crop(pixels: np.ndarray, size: int, resample: Filter) -> np.ndarray:
    """Resizes and center-crops uint8 [H, W, 3] of any size to uint8 [size, size, 3].

    Of an image so long that it would take much memory when scaled, only the part that the crop shows is
    resized. Its values may differ by rounding, since Pillow orders its two passes by the sizes.
    """
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    scaled = int(size * long / short)
    start = (scaled - size) // 2
    if size * scaled > _MAX_SCALED:
        return _resize_part(pixels, size, start * long / scaled, long / scaled, resample)
    new = (size, scaled) if height > width else (scaled, size)
    resized = np.asarray(PIL.Image.fromarray(pixels).resize(new, _FILTERS[resample]))
    return resized[start : start + size] if height > width else resized[:, start : start + size]


def stretch(pixels: np.ndarray, size: int | tuple[int, int], resample: Filter) -> np.ndarray:
    """Resizes uint8 [H, W, 3] of any size without a crop, as Emu and SigLIP 2 do.

    Args:
        pixels: the image.
        size: side of the square that it becomes, or its height and width.
        resample: the filter.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(PIL.Image.fromarray(pixels).resize((width, height), _FILTERS[resample]))


def size_of_patches(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """Height and width to which NaFlex (models/siglip2.py) scales an image: at most `most` patches.

    The scale is the largest at which the sides, rounded up to whole patches, have no more, found as the
    public code finds it.
    """

    def at(scale: float) -> tuple[int, int]:
        rows, columns = (max(math.ceil(side * scale / patch), 1) for side in (height, width))
        return rows * patch, columns * patch

    low, high = _LEAST_SCALE, _MOST_SCALE
    while high - low >= _SCALE_STEP:
        middle = (low + high) / 2
        rows, columns = (side // patch for side in at(middle))
        low, high = (middle, high) if rows * columns <= most else (low, middle)
    return at(low)


def _resize_part(
    pixels: np.ndarray, size: int, start: float, step: float, resample: Filter
) -> np.ndarray:
    """Resizes `size` steps of `step` pixels, from `start` on along the long side."""
    height, width = pixels.shape[:2]
    reach = _MARGIN * max(step, 1)
    low = max(math.floor(start - reach), 0)
    high = math.ceil(start + size * step + reach)
    first, last = start - low, start - low + size * step
    is_tall = height > width
    part = PIL.Image.fromarray(pixels[low:high] if is_tall else pixels[:, low:high])
    box = (0, first, width, last) if is_tall else (first, 0, last, height)
    return np.asarray(part.resize((size, size), _FILTERS[resample], box))
