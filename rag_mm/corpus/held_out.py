"""Which documents of corpora are held out from training, and which do not fit sequences of one pair each.

A document is chosen by the hash of its id: the same ones whatever the order of the corpora, and few others
if documents are added.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.corpus.corpus_reader import TokenCorpus
from rag_mm.corpus.packing_plan import MixturePart


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out documents.

    Attributes:
        part, document: which corpus of the mixture each is of, and its number there; int64 [H], in the order
            of their hashes.
        parts: the mixture, which never draws them, nor reads them before another document.
        num_unfit: documents that training leaves out as they have several texts or several images.
    """

    part: np.ndarray
    document: np.ndarray
    parts: list[MixturePart]
    num_unfit: int


def hold_out(parts: Sequence[MixturePart], number: int) -> HeldOut:
    """Chooses documents of one text and one image to hold out.

    A document of the same id is left out of every corpus, and of the neighbors that training reads.

    Args:
        parts: the corpora, opened.
        number: of documents to hold out, at least 0; of the same id in two corpora both count.

    Raises:
        UserError: there are no more pairs of a text and an image than are to be held out.
    """
    hashes, is_pair, is_fit = [], [], []
    for part in parts:
        counts = part.corpus.segment_counts()
        hashes.append(part.corpus.id_hashes())
        is_pair.append((counts == 1).all(axis=1))
        is_fit.append((counts <= 1).all(axis=1))
    pairs = [np.flatnonzero(each) for each in is_pair]
    of_part = np.repeat(np.arange(len(parts)), [len(each) for each in pairs])
    document = np.concatenate(pairs)
    found = np.concatenate([h[at] for h, at in zip(hashes, pairs, strict=True)])
    if number >= len(found) and number:
        raise UserError(
            f"{number:,} documents are to be held out, but the corpora hold {len(found):,} pairs of a text "
            "and an image; hold out fewer."
        )
    chosen = np.argsort(found, kind="stable")[:number]
    held = np.unique(found[chosen])
    kept = [
        dataclasses.replace(
            part,
            left_out=np.flatnonzero(np.isin(hashed, held) | ~fits),
            unread=_unread(part, held),
        )
        for part, hashed, fits in zip(parts, hashes, is_fit, strict=True)
    ]
    num_unfit = sum(int((~fits).sum()) for fits in is_fit)
    return HeldOut(of_part[chosen], document[chosen], kept, num_unfit)


def _unread(part: MixturePart, held: np.ndarray) -> np.ndarray | None:
    """Neighbors' documents that are held out or no pair, int64 [M]."""
    if part.neighbors is None:
        return None
    documents: TokenCorpus = part.neighbors.documents
    is_fit = (documents.segment_counts() <= 1).all(axis=1)
    return np.flatnonzero(np.isin(documents.id_hashes(), held) | ~is_fit)
