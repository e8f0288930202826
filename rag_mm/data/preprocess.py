"""Image preprocessing of public checkpoints: resize the shorter side, then center crop.

The order, rounding and filter are those that the checkpoints were trained with. `image_files.fit` instead
crops first, at subpixel positions, and then resizes: images that are not square give different results.
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
    """Resizes and center-crops uint8 [H, W, 3] of any size to uint8 [size, size, 3]."""
    height, width = pixels.shape[:2]
    short, long = sorted((height, width))
    scaled_long = int(size * long / short)
    new = (scaled_long, size) if height > width else (size, scaled_long)
    resized = PIL.Image.fromarray(pixels).resize((new[1], new[0]), _FILTERS[resample])
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(resized)[top : top + size, left : left + size]
