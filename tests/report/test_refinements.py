"""The page of what a memory changed: both sides, both guesses, and strangers' texts escaped."""

import numpy as np

from rag_mm.report import refinements


def card(text: str = "red apple") -> refinements.Card:
    grey = np.full((32, 32, 3), 128, np.uint8)
    return refinements.Card(
        picture=np.zeros((600, 300, 3), np.uint8),
        truth="apple",
        before=refinements.Guess("pear", 0.31, 0.12, False),
        after=refinements.Guess("apple", 0.9, 0.9, True),
        image_side=[refinements.Pair(grey, text), refinements.Pair(None, "")],
        asked_text="apple",
        text_side=[],
    )


def test_it_shows_both_sides_and_both_guesses():
    page = refinements.render("Zero-shot", [card(), card()])
    assert page.count("✗ pear") == page.count("✓ apple") == 2
    assert page.count("0.310") == 2 and page.count("0.120") == 2
    assert page.count("data:image/png;base64,") == 4  # Query and one hit; one hit has no picture.
    assert "(no text)" in page and "nothing" in page and "What “apple” found" in page


def test_strangers_text_is_escaped_and_pages_are_equal():
    page = refinements.render("t", [card("<script>x</script>")])
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page == refinements.render("t", [card("<script>x</script>")])
