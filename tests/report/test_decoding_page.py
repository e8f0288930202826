"""The page about decoding, and its picture of the sweep."""

import io

import numpy as np
import PIL.Image

from rag_mm.report import decoding_figure, decoding_page
from rag_mm.report.decoding_page import Frame, PageSection, Strip, TextTable

GRID = decoding_figure.SweepGrid(
    "bare",
    (0.4, 1.0),
    (0.0, 1.0, 3.0),
    np.array([[0, 0.7, 1], [0.1, 0.6, 0.2]]),
    np.full((2, 3), 0.03),
)


def test_the_picture_has_a_column_for_each_null_prompt():
    one, two = (
        PIL.Image.open(io.BytesIO(decoding_figure.sweep_png([GRID] * count))) for count in (1, 2)
    )
    assert two.width == 2 * one.width and two.height == one.height
    assert np.asarray(one.convert("L")).std() > 10


def test_the_page_needs_nothing_else_and_escapes_texts():
    image = np.zeros((4, 4, 3), np.uint8)
    frames = [Frame(image, ["weight <1>", "right"]), Frame(image, ["kept"], is_kept=True)]
    section = PageSection(
        "Guidance",
        "A <b>text</b>.",
        (decoding_figure.sweep_png([GRID]), "the sweep"),
        [Strip("<script>alert(1)</script>", frames)],
        [TextTable(["claim", ""], [["one", "met"], ["two", "not met"]], "A note.")],
    )
    html = decoding_page.render("Decoding", "A <i>lead</i>.", [section])
    assert "<script" not in html and "&lt;script&gt;" in html and "&lt;b&gt;" in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count('class="kept"') == 1 and html.count("data:image/png;base64,") == 3
    assert 'class="yes">met' in html and 'class="no">not met' in html
