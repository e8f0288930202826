"""A text and image decoder trained here, as a frozen language model of its texts."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import nnx

from rag_mm.data import sequences, token_documents
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.decode import tasks
from rag_mm.frozen_lm import language_model
from rag_mm.frozen_lm.lm_protocol import Completions


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentText:
    """The text ids of a vocabulary behind EOD, as a document begins (`language_model.TextTokenizer`)."""

    vocabulary: Vocabulary

    def encode_text(self, text: str) -> list[int]:
        """EOD and the text's ids."""
        return [self.vocabulary.eod, *self.vocabulary.encode_text(text)]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode_text`; also the number of the text's characters up to the end of each token."""
        ids = self.encode_text(text)
        folded = [char.casefold() if self.vocabulary.folds_case else char for char in text]
        # A folded character may be several.
        ends = np.cumsum([len(part) for part in folded])
        offsets = self.vocabulary.tokenizer.encode("".join(folded)).offsets
        return ids, [0, *(int(np.searchsorted(ends, end)) + 1 for _, end in offsets)]

    def token_texts(self, size: int) -> tuple[str, ...]:
        """The text of each id below `size`; empty for special tokens, image codes and unused ids."""
        count = self.vocabulary.text_size
        texts = self.vocabulary.tokenizer.decode_batch([[i] for i in range(count)])
        return (*texts, *("" for _ in range(size - count)))

    def decode_continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text of the ids after a prompt."""
        return self.vocabulary.decode_text(ids)


@dataclasses.dataclass(frozen=True, eq=False)
class DecoderTexts(language_model.LanguageModel):
    """Scores and completes the texts of documents (`lm_protocol.FrozenLM`), without images or retrieved ones.

    A text stands where a document's first text does in training: after EOD, at that text's positions. Texts
    longer than a document's were not seen in training.

    Example:
        model = open_lm("runs/quickstart")
        model.score(["red apple on a"], [" blue background", " green background"])  # float32 [1, 2]

    Attributes:
        generator: the decoder with its vocabulary and the layout of its sequences.
    """

    generator: tasks.Generator = dataclasses.field(kw_only=True)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        num_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Completions:
        """As `LanguageModel.generate`, by text tokens up to the end of the text."""
        ours = self.generator.vocabulary
        allowed = self.generator.token_mask(slice(ours.text_size), ours.brk)
        ids = self._ids_of(prompts)
        return self._complete(ids, allowed, num_tokens, temperature, top_p, seed)


def make(generator: tasks.Generator) -> DecoderTexts:
    """The language model of a trained decoder's texts."""
    layout, vocabulary = generator.layout, generator.vocabulary
    segment = token_documents.TokenSegment(token_documents.TEXT, [0])
    alone = sequences.lay_out(layout, vocabulary, token_documents.Example((segment,)))
    config = nnx.merge(generator.graphdef, generator.params).config
    return DecoderTexts(
        config=dataclasses.replace(config, max_seq_len=layout.num_positions),
        graphdef=generator.graphdef,
        params=generator.params,
        text=DocumentText(vocabulary),
        stop_tokens=(vocabulary.brk,),
        first_position=int(alone.positions[0]),
        generator=generator,
    )
