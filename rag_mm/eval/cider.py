"""CIDEr of written captions against the truth (RA-CM3 section 8), without Java.

The score is computed by the `Cider` class of `pycocoevalcap`; only its PTB tokenizer, a Java
program, is replaced by our own words. Scores are therefore comparable among our runs, and close
to but not equal to published ones.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from pycocoevalcap.cider import cider as pycoco_cider

from rag_mm.core.errors import UserError

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    """Lower-case words of `text`; punctuation is dropped, an inner apostrophe kept."""
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr of each candidate, to be averaged or paired by `eval.statistics`.

    Word weights come from the references of the whole set (a word in every document's reference
    weighs nothing), so scores may be compared only over the same references. An empty candidate
    scores 0. One reference a document is enough.

    Args:
        candidates: [N] captions written by a model; N >= 2.
        references: [N] lists of at least one true caption each.

    Returns:
        float64 [N], 0..10; papers print 100 times the mean.

    Raises:
        UserError: fewer than two documents: all word weights would be 0.
        ValueError: lengths differ, or a document has no reference with words in it.
    """
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} captions for {len(references)} documents")
    if len(candidates) < 2:
        raise UserError(
            f"CIDEr weighs words over a set of documents: {len(candidates)} are too few, "
            "evaluate at least 2."
        )
    truth = {}
    for i, captions in enumerate(references):
        truth[i] = [" ".join(words(caption)) for caption in captions]
        if not truth[i] or not all(truth[i]):
            raise ValueError(f"document {i} has no words in its references {list(captions)!r}")
    written = {i: [" ".join(words(caption))] for i, caption in enumerate(candidates)}
    _, scores = pycoco_cider.Cider().compute_score(truth, written)
    return np.asarray(scores, np.float64)


def are_named(candidates: Sequence[str], wanted: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """Whether each caption names all that its picture shows: bool [N].

    Args:
        candidates: [N] captions written by a model.
        wanted: [N] lists of things, each a list of names of which one is enough.
    """
    texts = [f" {' '.join(words(candidate))} " for candidate in candidates]

    def is_named(text: str, names: Sequence[str]) -> bool:
        return any(f" {' '.join(words(name))} " in text for name in names)

    pairs = zip(texts, wanted, strict=True)
    return np.array([all(is_named(text, names) for names in things) for text, things in pairs])
