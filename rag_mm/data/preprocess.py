"""Pictures as public checkpoints want them: the shorter side scaled, the middle cut out, in whole pixels.

`memory.images.fit` crops first and scales once, between pixels. Here the order, the rounding and the filter
are those that the checkpoints were trained with, which on pictures that are not square is not the same.
"""

from typing import Literal

import numpy as np
import PIL.Image

Filter = Literal["bicubic", "lanczos"]
_FILTERS = {
    "bicubic": PIL.Image.Resampling.BICUBIC,  # CLIP
    "lanczos": PIL.Image.Resampling.LANCZOS,  # Chameleon
}


def scale_and_crop(pixels: np.ndarray, size: int, resample: Filter) -> np.ndarray:
    """uint8 [H, W, 3] of any size -> uint8 [size, size, 3]."""
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    scaled_long = int(size * long / short)
    new = (scaled_long, size) if height > width else (size, scaled_long)
    picture = PIL.Image.fromarray(pixels).resize((new[1], new[0]), _FILTERS[resample])
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(picture)[top : top + size, left : left + size]
