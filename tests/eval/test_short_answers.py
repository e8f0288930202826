"""Answers are cut at the end of what they say first, and lose filler words."""

import pytest

from rag_mm.eval import short_answers


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" Red.", "red"),
        ("It is a red apple. The image shows", "red apple"),
        ("it's the left one, near a tree", "left one"),
        ('yes" said the man', "yes"),
        ("an apple\nquestion: what", "apple"),
        ("2.5 meters", "2.5 meters"),
        ("anything", "anything"),
    ],
)
def test_answers_are_cut(text, wanted):
    assert short_answers.clean(text) == wanted
