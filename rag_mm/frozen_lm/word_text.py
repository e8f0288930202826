"""Codes of an image as a line of words, and back (SPAE, Yu et al. 2023, arXiv 2306.17842)."""

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.frozen_lm.lm_protocol import FrozenLM


class ParsedWords(NamedTuple):
    """Codes int32 [M] read from a text, and which of them a valid word stood for, bool [M]."""

    codes: np.ndarray
    is_valid: np.ndarray


@dataclasses.dataclass(frozen=True)
class WordTable:
    """The word of each code of an image tokenizer.

    Attributes:
        words: different words without white space; code i is written as `words[i]`.

    Raises:
        UserError: a word is empty, has white space or occurs twice, so that text could not be read back.
    """

    words: tuple[str, ...]

    def __post_init__(self):
        if len(self.codes_by_word) != len(self.words):
            again = next(w for i, w in enumerate(self.words) if self.codes_by_word[w] != i)
            raise UserError(f"The word {again!r} stands for two codes; make the word list again.")
        for word in self.words:
            if word.split() != [word]:
                raise UserError(f"{word!r} is not one word; make the word list again without it.")

    @functools.cached_property
    def codes_by_word(self) -> dict[str, int]:
        """The code of each word."""
        return {word: code for code, word in enumerate(self.words)}

    def text(self, codes: Sequence[int] | np.ndarray) -> str:
        """The words of codes int [M], separated by spaces; `strict_codes` reads them back."""
        return " ".join(self.words[code] for code in np.asarray(codes, np.int64))

    def strict_codes(self, text: str) -> np.ndarray:
        """The codes int32 [M] of M words separated by white space.

        Raises:
            UserError: one of them is not a word of the table.
        """
        pieces = text.split()
        for piece in pieces:
            if piece not in self.codes_by_word:
                similar = difflib.get_close_matches(piece, self.words, n=1)
                hint = f"did you mean {similar[0]!r}?" if similar else "use the image's own words."
                raise UserError(f"{piece!r} is not one of the {len(self.words):,} words; {hint}")
        return np.asarray([self.codes_by_word[piece] for piece in pieces], np.int32)

    def parse(self, text: str, fallback: np.ndarray) -> ParsedWords:
        """Reads as many codes as `fallback` has from what a language model wrote.

        The first line that is not blank counts. Its i-th piece is the i-th word, in any case of letters. A
        piece that is no word of the table, or is missing, becomes `fallback[i]`; further pieces are ignored.

        Args:
            text: with words separated by white space.
            fallback: codes int [M].
        """
        codes = np.array(fallback, np.int32)
        is_valid = np.zeros(len(codes), bool)
        lines = text.strip().splitlines() or [""]
        for i, piece in enumerate(lines[0].split()[: len(codes)]):
            code = self.codes_by_word.get(piece, self.codes_by_word.get(piece.lower()))
            if code is not None:
                codes[i], is_valid[i] = code, True
        return ParsedWords(codes, is_valid)


def one_token_share(words: Sequence[str], lm: FrozenLM) -> float | None:
    """The share of words that are one token of a language model, with the space before them in a prompt.

    All words of a codebook are, in the model that they are of; what another one reads in pieces it may not
    know as words. None where a model does not tell its vocabulary, as one behind HTTP.

    Raises:
        UserError: none of the words is.
    """
    try:
        known = set(lm.vocabulary)
    except UserError:
        return None
    start = " " if any(text.startswith(" ") for text in known) else ""
    count = sum(start + word in known for word in words)
    if not count:
        raise UserError(
            f"None of the {len(words):,} words is one token of this language model; give the one whose words "
            "they are, or another with words of the same language."
        )
    return count / len(words)
