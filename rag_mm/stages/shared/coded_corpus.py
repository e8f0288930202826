"""Turns scenes and memory rows into the text ids and image codes that the decoder reads."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.core import code_grids, image_files
from rag_mm.core.errors import UserError
from rag_mm.data import sequences, token_documents
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.shared import frozen, world_config


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Makes `token_documents.Example`s for one sequence layout and one image tokenizer."""

    layout: sequences.Layout
    image_tokenizer: frozen.FrozenTokenizer

    def example(self, text: str, codes: np.ndarray) -> token_documents.Example:
        """One document, from its text and its codes int32 [N]; text beyond `layout.max_text_len` is cut."""
        ids, num_cut = token_documents.encode_text(
            self.image_tokenizer.vocabulary, text, self.layout.max_text_len
        )
        return token_documents.pair(ids, codes, num_cut=num_cut)

    def memory(self, memory: Memory) -> list[token_documents.Example]:
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
    ) -> tuple[list[token_documents.Example], np.ndarray]:
        """The Q scenes of `rows` with full captions, and which of their codes are art codes: bool [Q, N]."""
        codes, grids = self.codes(source, rows), self.image_tokenizer.grids
        masks = [code_grids.mask_of_pixels(source.entity_mask(int(row)), grids) for row in rows]
        mains = [
            self.example(source.full_caption(int(row)), image_codes)
            for row, image_codes in zip(rows, codes, strict=True)
        ]
        return mains, np.stack(masks)

    def codes(
        self,
        source: world_config.SplitDocuments,
        rows: np.ndarray | None = None,
        image_size: int | None = None,
    ) -> np.ndarray:
        """Codes of the images of some rows (all if None), scaled to a height in pixels: int32 [R, N]."""
        images = world_config.images(source, rows)
        if image_size is not None:
            images = np.stack([image_files.fit(image, image_size) for image in images])
        return self.image_tokenizer.encode(images)


def num_codes_at(image_tokenizer: frozen.FrozenTokenizer, image_size: int) -> int:
    """Number of codes of an image of a height in pixels."""
    return code_grids.num_codes(image_tokenizer.grids_at(image_size, image_size))


def image_len(image_tokenizer: frozen.FrozenTokenizer) -> int:
    """Number of tokens of the largest image: its codes, and a size token if there are several sizes."""
    sizes = image_tokenizer.vocabulary.image_sizes
    largest = max((num_codes_at(image_tokenizer, size) for size in sizes), default=0)
    return max(image_tokenizer.num_codes, largest) + bool(sizes)


def memory_image(memory: Memory, row: int) -> np.ndarray:
    """The image of a memory row, uint8 [H, W, 3].

    Raises:
        UserError: the row has no image, or its record is damaged.
    """
    pixels = memory.document(row).image
    if pixels is None:
        raise UserError(f"Row {row} of {memory.path} has no image.")
    return pixels


def pick(
    examples: Sequence[token_documents.Example], ids: np.ndarray
) -> list[token_documents.Example]:
    """The examples of the neighbors `ids` (-1 is skipped), best last, next to the main document."""
    return [examples[i] for i in ids[ids >= 0]][::-1]
