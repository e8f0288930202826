"""Turns scenes and memory rows into the text ids and image codes that the decoder reads."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data import sequences
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.shared import frozen, world_config


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Makes `sequences.Example`s for one sequence layout and one image tokenizer."""

    layout: sequences.Layout
    image_tokenizer: frozen.FrozenTokenizer

    def example(self, text: str, codes: np.ndarray) -> sequences.Example:
        """One document, from its text and its codes int32 [N]; text beyond `layout.max_text_len` is cut."""
        return sequences.make_example(self.layout, self.image_tokenizer.vocabulary, text, codes)

    def memory(self, memory: Memory) -> list[sequences.Example]:
        """An example of every row of a memory, in order.

        Raises:
            UserError: a record is damaged, or the memory was built without a tokenizer.
        """
        codes = memory.codes
        if codes is None:
            raise UserError(f"{memory.path} has no codes; build it with a tokenizer.")
        return [self.example(memory.document(i).text, codes[i]) for i in range(len(memory))]

    def test(
        self, source: world_config.SplitDocuments, rows: np.ndarray
    ) -> tuple[list[sequences.Example], np.ndarray]:
        """The Q scenes of `rows` with full captions, and which of their codes are art codes: bool [Q, N]."""
        model, codes = self.image_tokenizer.config, self.codes(source, rows)
        patch = model.image_size // model.levels[-1]
        masks = [source.entity_mask(int(row), patch).ravel() for row in rows]
        mains = [
            self.example(source.full_caption(int(row)), image_codes)
            for row, image_codes in zip(rows, codes, strict=True)
        ]
        return mains, np.stack(masks)

    def codes(
        self, source: world_config.SplitDocuments, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Codes of the images of some rows (all if None): int32 [R, N]."""
        return self.image_tokenizer.encode(world_config.images(source, rows))


def memory_image(memory: Memory, row: int) -> np.ndarray:
    """The image of a memory row, uint8 [H, W, 3].

    Raises:
        UserError: the row has no image, or its record is damaged.
    """
    pixels = memory.document(row).image
    if pixels is None:
        raise UserError(f"Row {row} of {memory.path} has no image.")
    return pixels


def pick(examples: Sequence[sequences.Example], ids: np.ndarray) -> list[sequences.Example]:
    """The examples of the neighbors `ids` (-1 is skipped), best last, next to the main document."""
    return [examples[i] for i in ids[ids >= 0]][::-1]
