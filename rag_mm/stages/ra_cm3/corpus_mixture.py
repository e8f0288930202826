"""Corpora in a config: which ones, how often each is drawn, and the sequences that are packed into rows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_mm.core import checks, code_grids
from rag_mm.core.errors import UserError
from rag_mm.corpus import packing_plan
from rag_mm.corpus.corpus_reader import TokenCorpus
from rag_mm.corpus.neighbor_rows import NeighborRows
from rag_mm.corpus.packing_plan import MixturePart, RowsConfig
from rag_mm.data.sequences import PACKED, Layout
from rag_mm.stages.ra_cm3.drawn_sequences import MaskingConfig

ONLY = "only"


@dataclasses.dataclass(frozen=True)
class CorpusEntry:
    """A corpus of a mixture.

    Attributes:
        path: its folder.
        weight: how often one of its documents is drawn, relative to the other corpora.
        neighbors: which of its folders of neighbors is read: the path of one, or the beginning of the
            memory's fingerprint, which its name holds; only, the default, is the one that there is; None
            reads none.
    """

    path: str
    weight: float = 1.0
    neighbors: str | None = ONLY

    def open(self, max_docs: int) -> MixturePart:
        """Opens the corpus and its neighbors, if sequences have any.

        Raises:
            UserError: either is missing, damaged or stale, or there are fewer neighbors than `max_docs`.
        """
        corpus = TokenCorpus(self.path)
        if self.neighbors is None or not max_docs:
            return MixturePart(corpus, self.weight)
        neighbors = NeighborRows(self._find(corpus, self.neighbors), corpus)
        found = neighbors.manifest.settings["num_neighbors"]
        if found < max_docs:
            raise UserError(
                f"num_docs_weights ask for {max_docs} documents, but {neighbors.path} has {found} neighbors "
                "of each query; give fewer weights, or search for more neighbors."
            )
        return MixturePart(corpus, self.weight, neighbors)

    def _find(self, corpus: TokenCorpus, wanted: str) -> Path:
        folders = sorted(corpus.path.glob("neighbors-*"))
        if wanted == ONLY:
            if len(folders) == 1:
                return folders[0]
            problem = "no neighbors" if not folders else f"neighbors in {len(folders)} memories"
            raise UserError(
                f"{corpus.path} has {problem}; run `rag-mm corpus neighbors`, name the memory by "
                "`neighbors`, or set that to None."
            )
        if Path(wanted).is_dir():
            return Path(wanted)
        matching = [f for f in folders if f.name.startswith(f"neighbors-{wanted[:16]}")]
        if len(matching) != 1:
            there = ", ".join(folder.name for folder in folders) or "none"
            raise UserError(
                f"neighbors is {wanted}, which is neither a folder nor a memory of {corpus.path}; it has "
                f"{there}."
            )
        return matching[0]


@dataclasses.dataclass(frozen=True)
class PackedSequencesConfig:
    """Documents and lengths of sequences from corpora, which are packed into rows.

    Attributes:
        max_seq_len: tokens in a row.
        num_docs_weights: relative frequencies of sequences with 0, 1, .. retrieved documents.
        max_text_len: texts are cut to this many tokens.
        code_noise: probability of replacing an input code of the main image by an earlier code of the
            sequence; targets stay clean.
        image_first_prob: probability, below 1, that all documents of a sequence begin with their image.
        window: sequences packed together. The more there are, the fuller the rows.
    """

    max_seq_len: int
    num_docs_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    max_text_len: int = 64
    code_noise: float = 0.0
    image_first_prob: float = 0.0
    window: int = 1024

    def __post_init__(self):
        checks.at_least(self, 1, "max_seq_len", "max_text_len", "window")
        checks.between(self, 0, 1, "code_noise")
        checks.below_one(self, "image_first_prob")
        _ = self.rows(0, MaskingConfig())  # Checks the weights.

    def rows(self, seed: int, masking: MaskingConfig) -> RowsConfig:
        """What the loader is told."""
        return RowsConfig(
            self.max_seq_len,
            seed,
            self.max_text_len,
            self.num_docs_weights,
            reserve=3 * masking.max_spans,
            window=self.window,
        )

    @property
    def max_docs(self) -> int:
        """Number of retrieved documents that a sequence has at most."""
        return max(i for i, weight in enumerate(self.num_docs_weights) if weight)


def read_entries(corpora: Sequence[Any]) -> tuple[CorpusEntry, ...]:
    """The corpora of a config, each the path of one or a group of `CorpusEntry`'s settings.

    Raises:
        UserError: an entry is neither, has an unknown setting, or a weight that is no positive number.
    """
    return tuple(_read_entry(entry) for entry in corpora)


def open_parts(
    entries: Sequence[CorpusEntry], sequences: PackedSequencesConfig, masking: MaskingConfig
) -> list[MixturePart]:
    """Opens corpora that are trained on together.

    Raises:
        UserError: there is none, one is missing, damaged or of another image tokenizer, neighbors are stale,
            or the image tokenizer has several image sizes or fewer sentinels than masking needs.
    """
    parts = [entry.open(sequences.max_docs) for entry in entries]
    packing_plan.check_mixture(parts)
    vocabulary = parts[0].corpus.vocabulary
    for part in parts:
        if part.corpus.manifest.vocabulary != vocabulary.fingerprint:
            raise UserError(
                f"{part.corpus.path} has another text vocabulary than {parts[0].corpus.path}; build both "
                "with one tokenizer."
            )
    if vocabulary.image_sizes:
        raise UserError(
            f"The image tokenizer of {parts[0].corpus.path} has several image sizes, of which a corpus holds "
            "one; build it with an image tokenizer of one size."
        )
    if masking.max_spans > vocabulary.num_sentinels:
        raise UserError(
            f"masking.max_spans is {masking.max_spans}, but the vocabulary has {vocabulary.num_sentinels} "
            "sentinels; mask fewer spans."
        )
    return parts


def make_layout(
    parts: Sequence[MixturePart], sequences: PackedSequencesConfig, masking: MaskingConfig
) -> Layout:
    """The layout of the sequences; without neighbors in any corpus they have no room for documents.

    Raises:
        UserError: rows are too short for a sequence of the most and longest documents.
    """
    return Layout(
        max_docs=sequences.max_docs if any(part.neighbors is not None for part in parts) else 0,
        max_text_len=sequences.max_text_len,
        num_codes=code_grids.num_codes(parts[0].corpus.manifest.grids),
        max_spans=masking.max_spans,
        kind=PACKED,
        max_seq_len=sequences.max_seq_len,
    )


def _read_entry(entry: Any) -> CorpusEntry:
    if isinstance(entry, CorpusEntry):
        return entry
    given = {"path": entry} if isinstance(entry, str) else entry
    names = [field.name for field in dataclasses.fields(CorpusEntry)]
    if not isinstance(given, Mapping) or "path" not in given or not set(given) <= set(names):
        raise UserError(
            f"corpora has {given!r}; give paths, or groups with path and perhaps weight and neighbors."
        )
    found = CorpusEntry(**given)
    is_number = isinstance(found.weight, int | float) and not isinstance(found.weight, bool)
    if not is_number or not 0 < found.weight < math.inf:
        raise UserError(
            f"The weight of {found.path} is {found.weight}; give a positive number, or leave the corpus out."
        )
    if not isinstance(found.path, str) or not isinstance(found.neighbors, str | None):
        raise UserError(f"corpora has {given!r}; give path and neighbors as text.")
    return found
