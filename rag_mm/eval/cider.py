"""CIDEr of generated captions against reference captions, without Java.

The score is computed by `pycocoevalcap.cider.Cider`; only its PTB tokenizer, a Java program, is replaced by a
regular expression. Scores are therefore comparable between our runs, and close but not equal to published
ones. In scripts that write no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each
character counts as a word, as in sacreBLEU's `zh` tokenizer; published scores for these segment words.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from pycocoevalcap.cider import cider as pycoco_cider

from rag_mm.core.errors import UserError

# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, Japanese, Chinese (also beyond the basic
# plane, and its iteration marks).
_UNSPACED = re.compile(
    r"[\u0e01-\u0eff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\u1780-\u17ff\u3005-\u3007\u3021-\u3029"
    r"\u3031-\u3035\u303b\u303c\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_APOSTROPHES = re.compile(r"(?<=\w)['’](?=[^\W_])")


def words(text: str) -> list[str]:
    """Lower-case words of `text`; punctuation is dropped, apostrophes inside words are kept.

    A letter keeps the marks that follow it. In scripts that write no spaces between words, each letter is a
    word.
    """
    text = unicodedata.normalize("NFC", text).lower()
    apostrophes = {match.start() for match in _APOSTROPHES.finditer(text)}
    found: list[str] = []
    last = ""  # What the character before belongs to: a word, a letter of its own, or nothing.
    for i, character in enumerate(text):
        is_letter = character.isalnum()
        if is_letter and _UNSPACED.match(character):
            found.append(character)
            last = "letter"
        elif last == "word" and (is_letter or i in apostrophes):
            found[-1] += character
        elif is_letter:
            found.append(character)
            last = "word"
        elif last and unicodedata.category(character).startswith("M"):
            found[-1] += character
        else:
            last = ""
    return found


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr of each candidate; average or pair the scores with `eval.statistics`.

    Word weights (IDF) come from the references of the whole set: a word in every document's reference has
    weight 0. Compare scores only on the same references. An empty candidate scores 0. One reference per
    document is enough.

    Args:
        candidates: [N] generated captions; N >= 2.
        references: [N] lists of at least one reference caption each.

    Returns:
        float64 [N], 0..10; papers report 100 times the mean.

    Raises:
        UserError: fewer than two documents, where every word weight would be 0.
        ValueError: lengths differ, or a document has no reference that contains words.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} captions for {len(references)} documents")
    if len(candidates) < 2:
        raise UserError(
            f"CIDEr weights words over a set of documents: {len(candidates)} are too few; "
            "evaluate at least 2."
        )
    truth = {}
    for i, captions in enumerate(references):
        truth[i] = [" ".join(words(caption)) for caption in captions]
        if not truth[i] or not all(truth[i]):
            raise ValueError(f"document {i} has no words in its references {list(captions)!r}")
    generated = {i: [" ".join(words(caption))] for i, caption in enumerate(candidates)}
    _, scores = pycoco_cider.Cider().compute_score(truth, generated)
    return np.asarray(scores, np.float64)


def are_named(candidates: Sequence[str], wanted: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """Whether each caption names every entity of its image: bool [N].

    Args:
        candidates: [N] generated captions.
        wanted: [N] lists of entities, each a list of accepted names.
    """
    texts = [f" {' '.join(words(candidate))} " for candidate in candidates]

    def is_named(text: str, names: Sequence[str]) -> bool:
        return any(f" {' '.join(words(name))} " in text for name in names)

    pairs = zip(texts, wanted, strict=True)
    return np.array([all(is_named(text, names) for names in entities) for text, entities in pairs])
