"""Images as a memory stores them: square, one size, as PNG bytes that are checked when read."""

import io

import numpy as np
import PIL.Image

from rag_mm.core.errors import UserError

MAX_PIXELS = 1 << 26
"""Images whose header declares more pixels (64 Mi, as 8192 x 8192) are not decoded."""


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """Scales the shorter side to `size` and center-crops: uint8 [H, W, 3] -> [size, size, 3].

    An image that already has this size is returned unchanged.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    side = min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    scaled = PIL.Image.fromarray(pixels).resize(
        (size, size),
        PIL.Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
    )
    return np.asarray(scaled)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Decodes the bytes of `encode_png` to uint8 [H, W, 3].

    Raises:
        UserError: the bytes are not an RGB PNG, or the image has more than `MAX_PIXELS` pixels.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode != "RGB" or image.width * image.height > MAX_PIXELS:
                raise UserError(f"A stored image is {image.mode} {image.width}x{image.height}.")
            return np.array(image)
    except UserError:
        raise
    except Exception as error:  # Damaged bytes can raise many types.
        raise UserError(f"A stored image cannot be decoded ({error}).") from error
