"""Scenes and memory rows as the decoder reads them: text ids and codes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.data import rows
from rag_mm.memory.memory import Memory
from rag_mm.stages import frozen
from rag_mm.stages import world as world_lib
from rag_mm.worlds.emoji import scenes as scene_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Makes examples of one layout and vocabulary."""

    layout: rows.Layout
    codec: frozen.Tokenizer

    def example(self, text: str, codes: np.ndarray) -> rows.Example:
        """One document; a text too long for the layout is cut."""
        return rows.make_example(self.layout, self.codec.vocabulary, text, codes)

    def memory(self, memory: Memory) -> list[rows.Example]:
        """Every row of a memory.

        Raises:
            UserError: a record is damaged.
        """
        codes = memory.codes
        return [self.example(memory.document(i).text, codes[i]) for i in range(len(memory))]

    def codes(self, source: scene_lib.Scenes, chosen: np.ndarray | None = None) -> np.ndarray:
        """Codes of scenes, int32 [R, N]."""
        return self.codec.encode(world_lib.images(source, chosen))


def pick(examples: Sequence[rows.Example], ids: np.ndarray, count: int) -> list[rows.Example]:
    """The first `count` present neighbors, the best one last: next to the main document."""
    return [examples[i] for i in ids[ids >= 0][:count]][::-1]
