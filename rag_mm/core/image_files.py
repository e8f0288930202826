"""Pictures as the memory keeps them: one square size, and PNG bytes that are not trusted."""

import io

import numpy as np
import PIL.Image

from rag_mm.core.errors import UserError

MAX_PIXELS = 1 << 26
"""No picture with more pixels is decoded (64 Mi: 8192 x 8192); its header tells."""


def fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """Scales the shorter side to `size` and crops the middle: uint8 [H, W, 3] -> [size, size, 3].

    A picture that has this size already comes back as it is.
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
    """The uint8 [H, W, 3] that `encode_png` was given.

    Raises:
        UserError: the bytes are not an RGB PNG of a bearable size.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode != "RGB" or image.width * image.height > MAX_PIXELS:
                raise UserError(f"A stored picture is {image.mode} {image.width}x{image.height}.")
            return np.array(image)
    except UserError:
        raise
    except Exception as error:  # Damaged bytes raise whatever the decoder stumbled over.
        raise UserError(f"A stored picture cannot be decoded ({error}).") from error
