"""Over-reliance on documents: what an image has from a retrieved document against its caption.

A fact counts as copied if it is a document's and not the caption's. Only scenes whose documents all differ
from the caption in that fact count: elsewhere following a document and following the caption is the same.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.eval import statistics
from rag_mm.worlds.emoji import emoji_scenes
from rag_mm.worlds.emoji.emoji_scenes import Facts, Level

FIGURES = ("copied_place", "copied_color", "copied_whole")
# Shares above these are too much; a model that follows its captions has a few wrong places by chance.
AT_MOST = {"copied_place": 0.05, "copied_color": 0.03, "copied_whole": 0.0}


class Copied(NamedTuple):
    """One fact of Q images: which are copied, and which could be, bool [Q]; none is copied that could not."""

    is_copied: np.ndarray
    is_eligible: np.ndarray


def places(facts: Facts, level: Level) -> tuple[str, ...]:
    """The places of a scene's entities, in alphabetical order."""
    return tuple(sorted(emoji_scenes.place(entity, level) for entity in facts.entities))


def measure(
    read: Sequence[Facts],
    asked: Sequence[Facts],
    documents: Sequence[Sequence[Facts]],
    level: Level,
    codes: np.ndarray,
    document_codes: Sequence[Sequence[np.ndarray]],
) -> dict[str, Copied]:
    """What Q images have from their documents against their captions.

    Args:
        read: facts that the scorer read from the images.
        asked: facts of the captions.
        documents: facts of the documents that each image was generated with.
        level: level of the scenes.
        codes: of the images, int [Q, N].
        document_codes: codes of the documents, each int [N], as `documents`.

    Returns:
        `copied_place` and `copied_color`; `copied_whole`, images all of whose codes are those of a document.
    """
    return {
        "copied_place": _copied(read, asked, documents, lambda facts: places(facts, level)),
        "copied_color": _copied(read, asked, documents, lambda facts: facts.color),
        "copied_whole": _whole(codes, document_codes),
    }


def accuracies(copied: dict[str, Copied]) -> dict[str, dict[str, float | int]]:
    """The shares of copied ones among those that could be, {"accuracy", "ci95", "n"}; none if none could."""
    return {
        name: statistics.accuracy(each.is_copied[each.is_eligible], name)
        for name, each in copied.items()
        if each.is_eligible.any()
    }


def per_document(copied: dict[str, Copied]) -> dict[str, np.ndarray]:
    """One value per image, float [Q], whose mean over all images is the share among those that could be.

    Figures that are compared over seeds need the same number of values at every seed, so images that cannot
    be copied count as 0 and copied ones for as much more than 1.
    """
    return {
        name: each.is_copied * (len(each.is_copied) / max(1, each.is_eligible.sum()))
        for name, each in copied.items()
    }


def _copied(
    read: Sequence[Facts],
    asked: Sequence[Facts],
    documents: Sequence[Sequence[Facts]],
    fact: Callable[[Facts], Hashable],
) -> Copied:
    found, possible = [], []
    for image, caption, shown in zip(read, asked, documents, strict=True):
        of_documents = {fact(each) for each in shown}
        possible.append(bool(of_documents) and fact(caption) not in of_documents)
        found.append(possible[-1] and fact(image) in of_documents)
    return Copied(np.array(found, bool), np.array(possible, bool))


def _whole(codes: np.ndarray, document_codes: Sequence[Sequence[np.ndarray]]) -> Copied:
    found = [
        any(np.array_equal(image, each) for each in shown)
        for image, shown in zip(codes, document_codes, strict=True)
    ]
    return Copied(np.array(found, bool), np.array([bool(len(each)) for each in document_codes]))
