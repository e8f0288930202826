"""Training sequences of RA-CM3: retrieved documents followed by the main document."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import grain
import numpy as np

from rag_mm.core import checks, manifest_values
from rag_mm.core.errors import UserError
from rag_mm.data import packing, pipeline, sequences
from rag_mm.data.token_documents import Example
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.stages.ra_cm3.drawn_sequences import MaskingConfig, SequenceDraws


@dataclasses.dataclass(frozen=True)
class SequencesConfig:
    """Documents, captions and lengths of a training sequence.

    Attributes:
        captions_per_image: captions of each image, with facts dropped at random; must equal that of
            `neighbors`.
        max_docs: maximum number of retrieved documents in a sequence.
        num_docs_weights: relative frequencies of batches with 0, 1, ..., max_docs documents per sequence
            (RA-CM3: uniform).
        max_text_len: maximum length of a caption in tokens; longer ones are truncated.
        mean_doc_text_len: tokens reserved per caption of a retrieved document; the rare sequence that needs
            more loses its first document.
        full_caption_prob: probability that the main caption states all facts, as at inference, whichever
            caption was the query.
        code_noise: probability of replacing an input code of the main image by an earlier code of the
            sequence; targets stay clean. Makes copying robust to the model's own errors.
        layout: slots, positions by document, each with room for its longest text; or packed, positions that
            run on, and several sequences in a row of `max_seq_len` tokens.
        max_seq_len: tokens in a row of the packed layout. A row holds more main documents the fewer are
            retrieved, so that a packed baseline sees more of them in a step.
        image_first_prob: probability, below 1, that all documents of a sequence begin with their image,
            before its caption. Images, captions and likelihoods are asked for in the other order.
    """

    captions_per_image: int = 4
    max_docs: int = 2
    num_docs_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    max_text_len: int = 24
    mean_doc_text_len: int = 24
    full_caption_prob: float = 0.0
    code_noise: float = 0.0
    layout: str = dataclasses.field(default=sequences.SLOTS, metadata=manifest_values.ADDED_LATER)
    max_seq_len: int = dataclasses.field(default=0, metadata=manifest_values.ADDED_LATER)
    image_first_prob: float = dataclasses.field(default=0.0, metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        checks.at_least(self, 0, "max_docs", "max_seq_len")
        checks.one_of(self, "layout", (sequences.SLOTS, sequences.PACKED))
        if len(self.num_docs_weights) != self.max_docs + 1:
            raise UserError(
                f"num_docs_weights has {len(self.num_docs_weights)} values; give {self.max_docs + 1}, "
                f"one for each count from 0 to max_docs={self.max_docs}."
            )
        if min(self.num_docs_weights) < 0 or not sum(self.num_docs_weights):
            raise ValueError(
                f"num_docs_weights are {self.num_docs_weights}; give at least 0, not all 0"
            )
        if not 0 <= self.mean_doc_text_len <= self.max_text_len:
            raise ValueError(
                f"mean_doc_text_len is {self.mean_doc_text_len}; give 0 to "
                f"max_text_len={self.max_text_len}"
            )
        checks.at_least(self, 1, "captions_per_image", "max_text_len")
        checks.between(self, 0, 1, "full_caption_prob", "code_noise")
        checks.below_one(self, "image_first_prob")
        if (self.layout == sequences.PACKED) != (self.max_seq_len > 0):
            raise UserError(
                f"layout is {self.layout} and max_seq_len is {self.max_seq_len}; give max_seq_len, the "
                "length of a row, to packed and only to it."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceSource:
    """Makes training sequences; `make` is a transform of `data.pipeline.make_batches`.

    Attributes:
        config: documents, captions and lengths.
        masking: which spans are masked.
        layout: positions of the parts of a sequence.
        vocabulary: vocabulary of the tokens.
        texts: `texts[i][d]` is main document i with caption d; the last caption states all facts.
        memory: documents that may be retrieved.
        neighbors: int32 [R, captions + 1, K], indices into `memory` for each caption and for the image,
            -1 for a missing neighbor; None for the baseline.
        resized: codes of the main images at the vocabulary's further image sizes, int32 [R, N] for each size;
            one of all sizes is drawn.
    """

    config: SequencesConfig
    masking: MaskingConfig
    layout: sequences.Layout
    vocabulary: Vocabulary
    texts: list[list[Example]]
    memory: list[Example]
    neighbors: np.ndarray | None
    resized: tuple[np.ndarray, ...] = ()

    def make(
        self, index: np.int64, rng: np.random.Generator, num_docs: int
    ) -> dict[str, np.ndarray]:
        """One sequence with at most `num_docs` retrieved documents, as arrays [T] by batch field.

        T is `length(num_docs)`.
        """
        length = self.length(num_docs)
        return self._draws.finish(self._draw(index, rng, num_docs, length), rng, length)

    def make_unpadded(self, index: np.int64, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One sequence with a number of documents drawn by its weight, as arrays [T] of its own length."""
        weights = np.asarray(self.config.num_docs_weights)
        num_docs = int(rng.choice(len(weights), p=weights / weights.sum()))
        return self._draws.finish(self._draw(index, rng, num_docs, self.layout.length), rng)

    def _draw(
        self, index: np.int64, rng: np.random.Generator, num_docs: int, length: int
    ) -> sequences.Tokens:
        """A masked sequence of at most `length` tokens; it loses its first documents if they do not fit.

        The caption is sampled first, so that the baseline gets the same main documents.
        """
        config, captions, draws = self.config, self.texts[index], self._draws
        caption = int(rng.integers(config.captions_per_image))
        main = captions[-1 if rng.random() < config.full_caption_prob else caption]
        docs: Sequence[Example] = []
        if self.neighbors is not None:
            query = caption if rng.random() < 0.5 else config.captions_per_image
            neighbors = self.neighbors[index, query]
            kept = rng.permutation(neighbors[neighbors >= 0])[:num_docs]
            docs = [self.memory[i] for i in kept]
        main, docs = draws.order(main, docs, rng)
        if self.resized and (drawn := int(rng.integers(len(self.resized) + 1))):
            size = self.vocabulary.image_sizes[drawn]
            main = main.with_codes(self.resized[drawn - 1][index], size)
        plain = sequences.lay_out(self.layout, self.vocabulary, main, docs)
        while len(plain.tokens) + 3 * self.layout.max_spans > length:
            docs = docs[1:]
            plain = sequences.lay_out(self.layout, self.vocabulary, main, docs)
        return draws.mask(plain, main, rng)

    @property
    def _draws(self) -> SequenceDraws:
        config = self.config
        return SequenceDraws(
            self.layout, self.vocabulary, self.masking, config.code_noise, config.image_first_prob
        )

    def length(self, num_docs: int) -> int:
        """Length in tokens of a sequence with `num_docs` documents, chosen for little padding."""
        layout = self.layout
        num_docs = min(num_docs, layout.max_docs)
        main_len = dataclasses.replace(layout, max_docs=0).length
        return main_len + num_docs * (
            layout.slot - layout.max_text_len + self.config.mean_doc_text_len
        )

    def batches(
        self, batch_size: int, seed: int, rows: range | None = None, num_workers: int = 0
    ) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Endless batches.

        In slots all sequences of a batch have the same number of documents, for little padding; packed rows
        hold several sequences.

        Args:
            batch_size: rows per batch.
            seed: seed of the order of documents and of the random choices in each sequence.
            rows: the part of each batch that this process makes (`sharding.local_rows`); None for all.
            num_workers: see `pipeline.make_batches`; packed rows are other ones for each number.
        """
        documents = np.arange(len(self.texts))
        if self.layout.kind == sequences.PACKED:
            pad = self.vocabulary.pad
            return packing.make_packed_batches(
                documents,
                batch_size,
                seed,
                self.make_unpadded,
                self.layout.max_seq_len,
                padding={"tokens": pad, "targets": pad},
                rows=rows,
                num_workers=num_workers,
            )
        return pipeline.make_batches(
            documents,
            batch_size,
            seed,
            *(partial(self.make, num_docs=count) for count in range(self.config.max_docs + 1)),
            shares=self.config.num_docs_weights,
            rows=rows,
            num_workers=num_workers,
        )

    @property
    def mean_length(self) -> float:
        """Mean length of a row in tokens, including padding."""
        if self.layout.kind == sequences.PACKED:
            return float(self.layout.max_seq_len)
        weights = np.asarray(self.config.num_docs_weights)
        lengths = [self.length(count) for count in range(self.config.max_docs + 1)]
        return float(weights / weights.sum() @ lengths)
