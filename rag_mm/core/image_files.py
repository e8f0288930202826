"""Images: any a caller has as RGB pixels; and as a memory stores them, square, of one size, as PNG bytes."""

import io
import os

import numpy as np
import PIL.Image

from rag_mm.core.errors import UserError

MAX_PIXELS = 1 << 26
"""Images whose header declares more pixels (64 Mi, as 8192 x 8192) are not decoded."""
MAX_DOCUMENT_PIXELS = 1 << 28
"""Nor are the pictures of a document that has more in all (256 Mi, 768 MiB of RGB)."""
_ORIENTATION = 0x0112
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

AnyImage = np.ndarray | PIL.Image.Image


def to_pixels(image: AnyImage, composite_on_white: bool = True) -> np.ndarray:
    """The pixels of an image as uint8 [H, W, 3], RGB.

    Args:
        image: a Pillow image, or an array [H, W] or [H, W, C], of uint8 in 0..255 or floats in 0..1; C is 1
            (gray), 3 (RGB) or 4 (RGBA).
        composite_on_white: whether transparent pixels are blended with white; else alpha is dropped.

    Raises:
        UserError: it is anything else.
    """
    if isinstance(image, PIL.Image.Image):
        return to_rgb(upright(image), composite_on_white)
    if isinstance(image, str | os.PathLike):
        raise UserError(f"{os.fspath(image)!r} is a path; open it with PIL.Image.open.")
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(
            f"An image has the shape {list(array.shape)}; give [H, W], [H, W, 3] or [H, W, 4]."
        )
    array = _to_bytes(array)
    if array.ndim == 3 and array.shape[2] == 3:
        return array
    return to_rgb(PIL.Image.fromarray(array), composite_on_white)


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"An image is of {array.dtype}; give uint8 in 0..255 or floats in 0..1.")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"An image of floats has values from {low:g} to {high:g}; give 0..1, or uint8 in 0..255."
        )
    return np.round(array * np.float32(255)).astype(np.uint8)


def orientation(image: PIL.Image.Image) -> int:
    """How a Pillow image lies, 1..8, by its EXIF or XMP data; 1, upright, without data that can be read."""
    image.load()  # Outside, so that damaged pixels are noticed.
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Damaged metadata can raise almost any exception.
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The Pillow image, turned as its `orientation` says."""
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: PIL.Image.Image, composite_on_white: bool) -> np.ndarray:
    """The pixels of a Pillow image of any mode as uint8 [H, W, 3]; the flag is that of `to_pixels`."""
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip values at 255, not scale them.
        values = np.asarray(image).astype(np.int64)
        gray = np.clip(values >> 8, 0, 255).astype(np.uint8)
        if composite_on_white and image.has_transparency_data:
            gray[values == image.info["transparency"]] = 255
        return np.repeat(gray[:, :, None], 3, axis=2)
    if composite_on_white and image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


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


def decode_png(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes the bytes of `encode_png` to uint8 [H, W, 3].

    Raises:
        UserError: the bytes are not an RGB PNG, or the image has more than `max_pixels` pixels.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode != "RGB" or image.width * image.height > max_pixels:
                raise UserError(f"A stored image is {image.mode} {image.width}x{image.height}.")
            return np.array(image)
    except UserError:
        raise
    except Exception as error:  # Damaged bytes can raise many types.
        raise UserError(f"A stored image cannot be decoded ({error}).") from error
