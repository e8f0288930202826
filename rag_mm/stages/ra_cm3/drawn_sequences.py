"""What is random in a training sequence of given documents: their order inside, masked spans, noise."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.core import checks, manifest_values
from rag_mm.core.roles import MAIN
from rag_mm.data import joint_layout, masking, sequences
from rag_mm.data.flat_documents import FlatDocuments
from rag_mm.data.joint_layout import Generators
from rag_mm.data.masking import Masking
from rag_mm.data.token_documents import TEXT, Example
from rag_mm.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How spans of a training sequence are replaced by sentinels and moved to its end (CM3, section 2).

    Attributes:
        max_spans: maximum number of spans in a sequence.
        prob: probability that a sequence has masked spans; the others are plain causal sequences.
        segment_prob: probability that a masked sequence masks whole captions or images.
        caption_prob: probability that a sequence masks the main caption only, as in captioning; with
            `segment_prob` alone, few sequences mask the main caption.
        min_spans: minimum number of spans in a masked sequence, 0 as in the public code of CM3, where a third
            of the sequences then stay plain, or 1 as in the paper.
    """

    max_spans: int = 3
    prob: float = 0.5
    segment_prob: float = 0.5
    caption_prob: float = 0.0
    min_spans: int = dataclasses.field(default=0, metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        checks.at_least(self, 0, "max_spans")
        checks.one_of(self, "min_spans", (0, 1))
        checks.between(self, 0, 1, "prob", "segment_prob", "caption_prob")


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceDraws:
    """Turns documents into training sequences; the random numbers are drawn in the order of the methods.

    Attributes:
        layout: positions of the parts of a sequence.
        vocabulary: vocabulary of the tokens.
        masking: which spans are masked.
        code_noise: probability of replacing an input code of the main image by an earlier code.
        image_first_prob: probability that all documents begin with their image.
    """

    layout: sequences.Layout
    vocabulary: Vocabulary
    masking: MaskingConfig
    code_noise: float = 0.0
    image_first_prob: float = 0.0

    def draw(
        self, main: Example, docs: Sequence[Example], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """One sequence as arrays [T] of its own length (`sequences.as_row`).

        Args:
            main: the main document.
            docs: documents before it, in sequence order.
            rng: of all that is random.
        """
        main, docs = self.order(main, docs, rng)
        plain = sequences.lay_out(self.layout, self.vocabulary, main, docs)
        return self.finish(self.mask(plain, main, rng), rng)

    def draw_all(
        self, documents: FlatDocuments, num_docs: np.ndarray, generators: Generators
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The sequences that `draw` makes, one after another, and their lengths (`corpus_loader.Draw`)."""
        numbers = range(len(num_docs))
        if self.image_first_prob:
            is_first = [generators(i).random() < self.image_first_prob for i in numbers]
            documents = documents.images_first(np.repeat(is_first, num_docs + 1))
        plain = joint_layout.lay_out_all(self.layout, self.vocabulary, documents, num_docs)
        lengths, masks = plain.lengths.tolist(), self._masks
        spans, states = [], []
        for i in numbers:
            rng = generators(i)
            if self.image_first_prob:
                rng.random()  # Drawn above.
            spans.append(self._spans(plain, i, lengths[i], masks, rng))
            if self.code_noise:
                states.append(rng.bit_generator.state)
        masked = joint_layout.mask_all(self.layout, self.vocabulary, plain, spans)
        rows = joint_layout.as_arrays(self.vocabulary, masked)
        for i, state in enumerate(states):
            rng = generators(i)
            rng.bit_generator.state = state
            one = {k: v[masked.firsts[i] : masked.firsts[i + 1]] for k, v in rows.items()}
            add_code_noise(one, self.vocabulary, self.code_noise, rng)
        return rows, masked.lengths

    @property
    def _masks(self) -> Masking:
        return Masking(self.masking.min_spans, self.masking.segment_prob, self.masking.prob)

    def _spans(
        self,
        plain: joint_layout.JointTokens,
        number: int,
        length: int,
        masks: Masking,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """The spans of one of the sequences, drawn as `mask` does."""
        if rng.random() < self.masking.caption_prob:
            main = slice(plain.main_segments[number], plain.first_segments[number + 1])
            texts = plain.segments[main][~plain.is_image[main]]
            if len(texts) and texts[0, 0] < texts[0, 1]:
                return texts[:1]
        segments = plain.segments_of(number)
        return masking.sample_spans(masks, segments, rng, self.masking.max_spans, length)

    def order(
        self, main: Example, docs: Sequence[Example], rng: np.random.Generator
    ) -> tuple[Example, Sequence[Example]]:
        """The documents, with their images first in some sequences."""
        if self.image_first_prob and rng.random() < self.image_first_prob:
            return main.images_first(), [document.images_first() for document in docs]
        return main, docs

    def mask(
        self, plain: sequences.Tokens, main: Example, rng: np.random.Generator
    ) -> sequences.Tokens:
        """The sequence with masked spans: the main caption, or spans anywhere."""
        is_caption = rng.random() < self.masking.caption_prob
        if is_caption and len(main.text):
            spans = plain.main[main.find(TEXT)][None]
        else:
            spans = masking.sample_spans(
                self._masks,
                plain.segments[plain.is_maskable],
                rng,
                self.masking.max_spans,
                len(plain.tokens),
            )
        return sequences.mask(self.layout, self.vocabulary, plain, spans)

    def finish(
        self, sequence: sequences.Tokens, rng: np.random.Generator, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """The arrays [T] of a sequence, padded to `length` if that is given, with noise in its codes."""
        row = sequences.as_row(self.vocabulary, sequence, length)
        add_code_noise(row, self.vocabulary, self.code_noise, rng)
        return row


def add_code_noise(
    row: dict[str, np.ndarray], vocabulary: Vocabulary, share: float, rng: np.random.Generator
) -> None:
    """Replaces a share of the input codes of the main image in place, each by a code from before it.

    Codes after it would reveal targets. The first code of a sequence has none before it and stays.
    """
    tokens = row["tokens"]
    is_code = tokens >= vocabulary.code_offset
    is_main = is_code & (np.roll(row["roles"], 1) == MAIN)
    num_before: np.ndarray = np.cumsum(is_code) - is_code
    is_noisy = is_main & (num_before > 0) & (rng.random(len(tokens)) < share)
    tokens[is_noisy] = tokens[is_code][rng.integers(num_before[is_noisy])]
