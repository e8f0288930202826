"""Codes as text and back."""

import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import prompts, word_text
from rag_mm.frozen_lm.endpoint import Endpoint
from rag_mm.frozen_lm.word_text import WordTable

TABLES = st.lists(
    st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=30, unique=True
).map(lambda words: WordTable(tuple(words)))


@st.composite
def table_and_codes(draw):
    table = draw(TABLES)
    codes = draw(st.lists(st.integers(0, len(table.words) - 1), min_size=1, max_size=20))
    return table, np.asarray(codes, np.int32)


@hypothesis.given(table_and_codes(), st.integers(0, 5))
def test_words_are_read_back(case, fallback):
    """Also behind what a language model goes on to write."""
    table, codes = case
    text = table.text(codes)
    np.testing.assert_array_equal(table.strict_codes(text), codes)
    parsed = table.parse(f" {text} more\nA: {text}", np.full(len(codes), fallback))
    np.testing.assert_array_equal(parsed.codes, codes)
    assert parsed.is_valid.all()


@hypothesis.given(table_and_codes())
def test_words_are_read_back_from_every_prompt(case):
    table, codes = case
    text = table.text(codes)
    continued = prompts.Continued(text, text, text)
    answered = prompts.Answered(text, "which?", "red")
    made = {
        "Input": prompts.classification([(text, "lion")], [text], ["lion"]),
        "Q": prompts.captioning([(text, "a lion")], text),
        "C": prompts.answering([answered], text, "which?"),
        "A": prompts.next_words([continued], continued, None),
    }
    for field, prompt in made.items():
        lines = (prompt.prefix + prompt.queries[0]).splitlines()
        shown = [line.removeprefix(f"{field}: ") for line in lines if line.startswith(f"{field}: ")]
        assert len(shown) == (1 if field == "A" else 2)
        for line in shown:
            np.testing.assert_array_equal(table.strict_codes(line), codes)


@pytest.mark.parametrize(
    ("text", "codes", "is_valid"),
    [
        ("cat sun", [0, 1, 7], [1, 1, 0]),
        ("cat zzz sun", [0, 8, 1], [1, 0, 1]),
        ("CAT Sun cat cat", [0, 1, 0], [1, 1, 1]),
        ("\n\n sun\ncat cat", [1, 8, 7], [1, 0, 0]),
        ("", [9, 8, 7], [0, 0, 0]),
        ("cat\u00a0sun\u2028x", [0, 1, 7], [1, 1, 0]),
    ],
)
def test_what_is_no_word_becomes_the_fallback(text, codes, is_valid):
    parsed = WordTable(("cat", "sun")).parse(text, np.array([9, 8, 7]))
    assert parsed.codes.tolist() == codes
    assert parsed.is_valid.tolist() == [bool(each) for each in is_valid]


def test_an_unknown_word_is_named():
    with pytest.raises(UserError, match="'sum' is not one of the 2 words; did you mean 'sun'?"):
        WordTable(("cat", "sun")).strict_codes("cat sum")


@pytest.mark.parametrize(
    ("vocabulary", "share"),
    [(["c", "at", " cat", "sun"], 0.5), (["cat", "sun"], 1.0), ([" cat", " sun", "x"], 1.0)],
)
def test_the_share_of_words_that_are_one_token(vocabulary, share):
    """A token of a word holds the space before it, if any token of the model does."""
    lm = types.SimpleNamespace(vocabulary=vocabulary)
    assert word_text.one_token_share(("cat", "sun"), lm) == share


def test_words_of_another_kind_of_vocabulary_are_refused():
    lm = types.SimpleNamespace(vocabulary=[" c", "a", "t"])
    with pytest.raises(UserError, match="None of the 2 words is one token of this language model"):
        word_text.one_token_share(("cat", "sun"), lm)


def test_an_endpoint_does_not_tell_how_many_words_are_one_token():
    assert word_text.one_token_share(("cat",), Endpoint("http://127.0.0.1:9/v1", "tiny")) is None


@pytest.mark.parametrize("words", [("cat", "sun", "cat"), ("cat", "two words"), ("cat", "")])
def test_words_that_could_not_be_read_back_are_refused(words):
    with pytest.raises(UserError, match="make the word list again"):
        WordTable(words)
