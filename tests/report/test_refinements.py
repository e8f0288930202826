"""The zero-shot page shows hits of both modalities and both predictions; texts are escaped."""

import numpy as np

from rag_mm.report import refinements


def card(text: str = "red apple") -> refinements.Card:
    grey = np.full((32, 32, 3), 128, np.uint8)
    return refinements.Card(
        picture=np.zeros((600, 300, 3), np.uint8),
        truth="apple",
        before=refinements.Guess("pear", 0.31, 0.12, False),
        after=refinements.Guess("apple", 0.9, 0.9, True),
        image_neighbors=[refinements.Pair(grey, text), refinements.Pair(None, "")],
        text_query="apple",
        text_neighbors=[],
    )


def test_it_shows_both_modalities_and_both_predictions():
    page = refinements.render("Zero-shot", [card(), card()])
    assert page.count("✗ pear") == page.count("✓ apple") == 2
    assert page.count("0.310") == 2 and page.count("0.120") == 2
    assert (
        page.count("data:image/png;base64,") == 4
    )  # Query and one hit; the other hit has no image.
    assert "(no text)" in page and "no hits" in page and "Hits of “apple”" in page


def test_text_is_escaped_and_pages_are_equal():
    page = refinements.render("t", [card("<script>x</script>")])
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page == refinements.render("t", [card("<script>x</script>")])
