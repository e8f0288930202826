"""Scenes and memory rows as the decoder reads them: text ids and codes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data import sequences
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.shared import frozen, world_config


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Makes examples of one layout and vocabulary."""

    layout: sequences.Layout
    image_tokenizer: frozen.FrozenTokenizer

    def example(self, text: str, codes: np.ndarray) -> sequences.Example:
        """One document; a text too long for the layout is cut."""
        return sequences.make_example(self.layout, self.image_tokenizer.vocabulary, text, codes)

    def memory(self, memory: Memory) -> list[sequences.Example]:
        """Every row of a memory.

        Raises:
            UserError: a record is damaged, or the memory was built without a tokenizer.
        """
        codes = memory.codes
        if codes is None:
            raise UserError(f"{memory.path} holds no codes; build it with a tokenizer.")
        return [self.example(memory.document(i).text, codes[i]) for i in range(len(memory))]

    def test(
        self, source: world_config.SplitDocuments, chosen: np.ndarray
    ) -> tuple[list[sequences.Example], np.ndarray]:
        """Scenes with all facts told, and which of their codes show an entity: bool [Q, N]."""
        model, codes = self.image_tokenizer.config, self.codes(source, chosen)
        patch = model.image_size // model.levels[-1]
        masks = [source.entity_mask(int(row), patch).ravel() for row in chosen]
        mains = [
            self.example(source.full_caption(int(row)), own)
            for row, own in zip(chosen, codes, strict=True)
        ]
        return mains, np.stack(masks)

    def codes(
        self, source: world_config.SplitDocuments, chosen: np.ndarray | None = None
    ) -> np.ndarray:
        """Codes of scenes, int32 [R, N]."""
        return self.image_tokenizer.encode(world_config.images(source, chosen))


def picture(memory: Memory, row: int) -> np.ndarray:
    """A memory row's picture, uint8 [H, W, 3].

    Raises:
        UserError: it has none, or its record is damaged.
    """
    pixels = memory.document(row).image
    if pixels is None:
        raise UserError(f"Row {row} of {memory.path} has no picture.")
    return pixels


def pick(examples: Sequence[sequences.Example], ids: np.ndarray) -> list[sequences.Example]:
    """The present neighbors, the best one last: next to the main document."""
    return [examples[i] for i in ids[ids >= 0]][::-1]
