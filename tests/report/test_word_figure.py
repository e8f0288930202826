"""The picture of an image as words."""

import io

import numpy as np
import PIL.Image
import pytest

from rag_mm.report import word_figure
from rag_mm.report.word_figure import WordedImage, WordLevel


def drawn(words, scores, side=8) -> np.ndarray:
    pixels = np.full((side, side, 3), (200, 30, 30), np.uint8)
    decoded = np.full((side, side, 3), (30, 30, 200), np.uint8)
    level = WordLevel(words, scores, len(words) ** 2, decoded, 12.3)
    data = word_figure.words_png(WordedImage(pixels, (level,)))
    assert data == word_figure.words_png(WordedImage(pixels, (level,)))
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def share(picture: np.ndarray, color) -> float:
    return float((np.abs(picture - np.asarray(color)).max(axis=2) < 8).mean())


def test_it_shows_the_image_its_words_and_what_they_decode_to():
    words = (("cat", "sun"), ("$x^", "extraordinarily"))
    picture = drawn(words, np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert share(picture, (200, 30, 30)) > 0.1 and share(picture, (30, 30, 200)) > 0.1
    green, brown = (
        (0, 60, 48),
        (84, 48, 5),
    )  # The ends of the scale, each in a quarter of the cells.
    assert 0.02 < share(picture, green) < 0.1 and 0.02 < share(picture, brown) < 0.1
    assert share(drawn(words, None), green) == 0


@pytest.mark.parametrize(("side", "is_wide"), [(2, False), (16, True), (32, False)])
def test_a_fine_grid_grows_as_long_as_its_words_can_be_read(side, is_wide):
    picture = drawn((("word",) * side,) * side, np.ones((side, side)))
    assert (picture.shape[1] > 1300) == is_wide
