"""Captions of every file and queries become one form."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_mm.core import caption_text

CAFE = unicodedata.normalize("NFC", "café")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red apple", "a red apple"),
        ("\ufefftile 0\r\n", "tile 0"),
        ("  led by spaces", "led by spaces"),
        ("two\r\n  lines\n\nand a third\r", "two lines and a third"),
        (unicodedata.normalize("NFD", CAFE), CAFE),
        ("Case  and inner spaces stay", "Case  and inner spaces stay"),
        (" \ufeff\n\t", ""),
    ],
)
def test_one_form(text, expected):
    assert caption_text.clean(text) == expected


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    once = caption_text.clean(text)
    assert caption_text.clean(once) == once
