"""How well a decoder predicts the codes of documents held out of corpora, with and without neighbors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rag_mm.corpus import shuffled_order
from rag_mm.corpus.held_out import HeldOut
from rag_mm.corpus.packing_plan import MixturePart
from rag_mm.data.token_documents import IMAGE, TEXT, Example
from rag_mm.decode.tasks import Generator
from rag_mm.eval import likelihood, statistics

NLL, UNIGRAM = "code_nll", "unigram"
_COUNTED = 1 << 16  # Training documents whose codes are counted.
_READ_AT_ONCE = 4096
_LOGITS_BYTES = 1 << 28  # Most bytes of the logits that are computed at once.


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutDocuments:
    """Held-out documents as tokens.

    Attributes:
        mains: H documents of one text and one image.
        docs: the neighbors of each by its text, best first.
        max_docs: number of neighbors that the decoder reads at most.
    """

    mains: list[Example]
    docs: list[list[Example]]
    max_docs: int

    def first(self, number: int) -> "HeldOutDocuments":
        """The first documents alone, whose hashes, and so they themselves, are a random choice."""
        return HeldOutDocuments(self.mains[:number], self.docs[:number], self.max_docs)

    def score(self, generator: Generator, num_docs: int) -> np.ndarray:
        """Mean NLL in nats of a code of each document, float64 [H], after its best neighbors and its text.

        A document with fewer neighbors than `num_docs` reads all that it has. With a mesh in context every
        process of it calls this.
        """
        docs = [documents[:num_docs][::-1] for documents in self.docs]  # The best one stands last.
        vocab_size = generator.params["embedding"]["table"].shape[0]
        length = generator.layout.unmasked_length
        batch_size = max(1, _LOGITS_BYTES // (4 * vocab_size * length))
        nll = likelihood.score_codes(generator, self.mains, docs, batch_size).nll
        return nll.astype(np.float64).mean(axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutWatch:
    """Mean NLL of a code of some held-out documents at every checkpoint."""

    documents: HeldOutDocuments

    def __call__(self, step: int, generator: Generator) -> dict[str, float]:
        """`held_out_nll_docsK` in nats, for K from 0 to the most documents."""
        if not self.documents.mains:
            return {}
        return {
            f"held_out_nll_docs{count}": float(self.documents.score(generator, count).mean())
            for count in range(self.documents.max_docs + 1)
        }


def read(held: HeldOut, max_text_len: int, max_docs: int) -> HeldOutDocuments:
    """Reads the held-out documents and their neighbors, which may be any of the memory's.

    Args:
        held: which they are.
        max_text_len: texts are cut to this many ids.
        max_docs: number of neighbors to read at most.
    """
    mains: list[Example | None] = [None] * len(held.document)
    docs: list[list[Example]] = [[] for _ in mains]
    for number, part in enumerate(held.parts):
        at = np.flatnonzero(held.part == number)
        found = part.corpus.read(held.document[at])
        for i, document in zip(at.tolist(), found, strict=True):
            mains[i] = document.example.cut(max_text_len)
        if part.neighbors is None or not max_docs:
            continue
        for i, rows in zip(at.tolist(), part.neighbors.take(held.document[at])[:, 0], strict=True):
            near = [d.example for d in part.neighbors.documents.read(rows[rows >= 0])]
            docs[i] = [each.cut(max_text_len) for each in near if _is_fit(each)][:max_docs]
    return HeldOutDocuments([main for main in mains if main is not None], docs, max_docs)


def measure(
    generator: Generator, documents: HeldOutDocuments, code_probs: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean NLL of a code of each document by variant, float64 [H].

    Args:
        generator: the decoder.
        documents: the held-out documents.
        code_probs: `count_codes`.

    Returns:
        docs0, docs1, .. with as many documents; unigram, by the frequency of codes in training.
    """
    found = {
        f"docs{count}": documents.score(generator, count) for count in range(documents.max_docs + 1)
    }
    nll = -np.log(code_probs)
    found[UNIGRAM] = np.array([nll[main.codes].mean() for main in documents.mains])
    return found


def summarize(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means with intervals of what `measure` returns, and differences paired by document.

    Returns:
        {variant: {code_nll: mean}}, and under `paired` each number of documents minus one fewer and minus
        none, and none minus the unigram.
    """
    most = len(values) - 2
    pairs = [(f"docs{count}", f"docs{count - 1}") for count in range(1, most + 1)]
    pairs += [(f"docs{count}", "docs0") for count in range(2, most + 1)]
    pairs.append(("docs0", UNIGRAM))
    paired = {
        f"{ours} - {theirs}": statistics.paired_difference(values[ours], values[theirs], NLL)
        for ours, theirs in pairs
    }
    means = {name: {NLL: statistics.mean(each, NLL)} for name, each in values.items()}
    return {**means, "paired": paired}


def count_codes(parts: Sequence[MixturePart], seed: int) -> np.ndarray:
    """Probabilities of the codes in training documents, float64 [C], each one counted once more.

    At most 65,536 random documents are read, of each corpus as many as its share of the mixture.
    """
    total_weight = sum(part.weight for part in parts)
    counts = np.ones(parts[0].corpus.manifest.codebook_size)
    for part in parts:
        is_left = np.ones(len(part.corpus), bool)
        if part.left_out is not None:
            is_left[part.left_out] = False
        usable = np.flatnonzero(is_left)
        wanted = max(1, round(_COUNTED * part.weight / total_weight))
        order = shuffled_order.permute(
            np.arange(min(wanted, len(usable))), max(1, len(usable)), seed
        )
        for start in range(0, len(order), _READ_AT_ONCE):
            for document in part.corpus.read(usable[order[start : start + _READ_AT_ONCE]]):
                codes = [s.ids for s in document.example.segments if s.kind == IMAGE]
                # A corpus smaller than its share counts as often as it is drawn.
                counts += wanted / len(order) * _count(codes, len(counts))
    return counts / counts.sum()


def _count(codes: Sequence[Any], size: int) -> np.ndarray:
    found = np.concatenate([np.zeros(0, np.int64), *(np.asarray(ids, np.int64) for ids in codes)])
    return np.bincount(found, minlength=size)


def _is_fit(example: Example) -> bool:
    """Whether it has no more than one text and one image."""
    kinds = [segment.kind for segment in example.segments]
    return kinds.count(TEXT) <= 1 and kinds.count(IMAGE) <= 1
