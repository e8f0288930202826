"""Whatever a caller has as an image becomes the same RGB pixels, or one sentence."""

import io
import pathlib

import numpy as np
import PIL.Image
import pytest

from rag_mm.core import image_files
from rag_mm.core.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
GRAY = RGB[:, :, 0]


@pytest.mark.parametrize(
    "image",
    [
        RGB,
        RGB / 255,
        (RGB / 255).astype(np.float32),
        np.dstack([RGB, np.full((4, 5), 255, np.uint8)]),
        np.dstack([RGB / 255, np.ones((4, 5))]),
        PIL.Image.fromarray(RGB),
        PIL.Image.fromarray(RGB).convert("RGBA"),
    ],
    ids=["uint8", "float64", "float32", "rgba", "rgba floats", "pillow", "pillow rgba"],
)
def test_colors_are_kept(image):
    pixels = image_files.to_pixels(image)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, RGB)


@pytest.mark.parametrize(
    "image",
    [GRAY, GRAY[:, :, None], GRAY / 255, PIL.Image.fromarray(GRAY)],
    ids=["[H, W]", "[H, W, 1]", "floats", "pillow"],
)
def test_gray_becomes_three_equal_channels(image):
    np.testing.assert_array_equal(image_files.to_pixels(image), np.dstack([GRAY] * 3))


def test_transparency_is_blended_with_white_or_dropped():
    clear = np.zeros((1, 2, 4), np.uint8)
    clear[0, 1, 3] = 255
    assert image_files.to_pixels(clear)[0, :, 0].tolist() == [255, 0]
    assert image_files.to_pixels(clear, composite_on_white=False)[0, :, 0].tolist() == [0, 0]


def test_a_pillow_image_is_rotated_as_its_exif_data_says():
    image = PIL.Image.fromarray(RGB)
    image.getexif()[0x0112] = 3
    np.testing.assert_array_equal(image_files.to_pixels(image), RGB[::-1, ::-1])


def test_damaged_pixels_of_a_pillow_image_are_an_error():
    data = bytearray(image_files.encode_png(RGB))
    data[data.index(b"IDAT") + 12] ^= 0xFF
    with PIL.Image.open(io.BytesIO(data)) as image, pytest.raises(OSError, match="data stream"):
        image_files.to_pixels(image)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("some/a.png", "'some/a.png' is a path; open it with PIL.Image.open"),
        (pathlib.Path("a.png"), "'a.png' is a path"),
        (RGB.astype(np.float32), "floats has values from 1 to 255|floats has values from 0 to"),
        (RGB / 255 - 0.5, "floats has values from -0"),
        (np.full((2, 2, 3), np.nan), "floats has values from nan"),
        (RGB.astype(np.int64), "is of int64"),
        (RGB[:, :, :2], r"has the shape \[4, 5, 2\]"),
        (RGB[:0], r"has the shape \[0, 5, 3\]"),
        (RGB[None], r"has the shape \[1, 4, 5, 3\]"),
        (None, r"has the shape \[\]"),
    ],
)
def test_anything_else_is_one_sentence(image, reason):
    with pytest.raises(UserError, match=reason):
        image_files.to_pixels(image)
