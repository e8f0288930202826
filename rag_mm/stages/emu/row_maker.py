"""Sequences of parts as arrays of ids, targets and roles, and batches of packed ones."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from rag_mm.core import image_slots
from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.core.roles import IGNORED, MAIN, RETRIEVED
from rag_mm.data import packing, pipeline
from rag_mm.data.interleaved import Mark, Part, Parts

# Of each sequence an array as long as it counts where rows are packed.
_COUNTED = "counted"


@dataclasses.dataclass(frozen=True, eq=False)
class RowMaker:
    """Makes sequences of parts.

    Attributes:
        encode: ids of a text.
        ids: the special tokens.
        num_slots: N, slots of an image.
        max_text_len: texts are cut to this many tokens.
        marks: ids of the marks of a dialogue; none where the model was not tuned on dialogues.
    """

    encode: Callable[[str], list[int]]
    ids: SlotTokens
    num_slots: int
    max_text_len: int
    marks: Mapping[Mark, Sequence[int]] = dataclasses.field(default_factory=dict)

    def text(self, text: str) -> list[int]:
        """The ids of a text, cut."""
        return self.encode(text)[: self.max_text_len]

    def ids_of(self, part: Part) -> Sequence[int] | None:
        """The ids of a part; None for a picture. UserError for a mark that the model does not know."""
        if isinstance(part, str):
            return self.text(part)
        if isinstance(part, tuple):
            return part
        if not isinstance(part, Mark):
            return None
        if part not in self.marks:
            raise UserError(
                "This Emu was not tuned on instructions; train the stage emu_sft, as configs/emu.py:sft does."
            )
        return self.marks[part]

    def pieces(self, part: Part, longest: int) -> Parts:
        """A text as its ids in pieces of at most `longest`, nothing cut; other parts as they are."""
        if not isinstance(part, str):
            return (part,)
        ids = self.encode(part)
        return tuple(tuple(ids[i : i + longest]) for i in range(0, len(ids), longest))

    def size(self, part: Part) -> int:
        """Tokens of a part."""
        ids = self.ids_of(part)
        return self.num_slots + 2 if ids is None else len(ids)

    def length(self, parts: Parts) -> int:
        """Tokens of a training sequence of these parts."""
        return 2 + sum(map(self.size, parts))

    def prompt(self, parts: Parts, *, starts_image: bool = False) -> image_slots.SlottedIds:
        """The sequence up to where the model goes on; its images are numbered in order."""
        ids = [self.ids_of(part) for part in parts]
        return image_slots.interleave(ids, self.ids, self.num_slots, starts_image=starts_image)

    def row(self, retrieved: Parts, main: Parts) -> dict[str, np.ndarray]:
        """A training sequence, arrays [T]; `pictures` int32 [I] are its pictures in order.

        `targets`, `roles`, `positions` and `segment_ids` are as of `data.sequences.as_row`.
        """
        parts = (*retrieved, *main)
        ids = [self.ids_of(part) for part in parts]
        tokens = image_slots.interleave(ids, self.ids, self.num_slots, has_end=True).tokens
        targets = np.append(tokens[1:], self.ids.pad).astype(np.int32)
        num_retrieved = sum(map(self.size, retrieved))
        roles = np.full(len(tokens), MAIN, np.int8)
        roles[:num_retrieved], roles[-1] = RETRIEVED, IGNORED
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": np.arange(len(tokens), dtype=np.int32),
            "segment_ids": np.ones(len(tokens), np.int32),
            "roles": roles,
            "pictures": np.array([part for part in parts if isinstance(part, int)], np.int32),
        }

    def dialogue(self, parts: Parts) -> dict[str, np.ndarray]:
        """A training sequence as of `row`, whose main targets are the answers and what ends each.

        An answer is the text after `Mark.ASSISTANT`, up to `Mark.END` or the end of the sequence; the last
        part need not be `Mark.END`.
        """
        parts = parts[:-1] if parts[-1] is Mark.END else parts
        row = self.row((), parts)
        is_answer = np.zeros(len(row["tokens"]), bool)
        end, answers = 1, False  # Behind the id that begins the sequence.
        for part in parts:
            start, end = end, end + self.size(part)
            # The target of a position is the token after it.
            is_answer[start - 1 : end - 1] = answers
            answers = part is Mark.ASSISTANT or (answers and part is not Mark.END)
        is_answer[end - 1] = answers
        return row | {"roles": np.where(is_answer, MAIN, IGNORED).astype(np.int8)}


class RowSize(NamedTuple):
    """Rows in a batch, tokens and images in a row, and how many slots of an image count there; None: all.

    Where an image has more slots than it counts for, rows are longer.
    """

    batch_size: int
    max_seq_len: int
    max_images: int
    counted_slots: int | None = None

    def length(self, num_slots: int) -> int:
        """Positions of a row whose images have N slots."""
        return self.max_seq_len + max(0, self.uncounted(num_slots)) * self.max_images

    def uncounted(self, num_slots: int) -> int:
        """How many more slots an image has than it counts for."""
        return 0 if self.counted_slots is None else num_slots - self.counted_slots


def pack_rows(
    numbers: np.ndarray,
    make: pipeline.Transform,
    maker: RowMaker,
    size: RowSize,
    take: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    seed: int,
    rows: range | None = None,
    num_workers: int = 0,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches of packed sequences, see `packing`; the slots of each row are numbered.

    Args:
        numbers: what sequences are made of.
        make: (one of them, generator) -> a sequence as of `RowMaker.row`.
        maker: knows the special ids.
        size: of a batch.
        take: by name of a batch's array, pictures int [B, I] -> that array [B, I, ...].
        seed, rows, num_workers: as of `packing.make_packed_batches`.
    """
    ids, uncounted = maker.ids, size.uncounted(maker.num_slots)

    def count(number: Any, rng: np.random.Generator) -> packing.Row:
        row = make(number, rng)
        length = len(row["tokens"]) - uncounted * len(row["pictures"])
        return row | {_COUNTED: np.zeros(length, bool)}

    def finish(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        is_slot = batch["tokens"] == ids.slot
        slot = np.where(is_slot, np.cumsum(is_slot, axis=1) - 1, -1).astype(np.int32)
        pictures = batch.pop("pictures")
        del batch[_COUNTED]
        return batch | {"slot": slot} | {name: each(pictures) for name, each in take.items()}

    return packing.make_packed_batches(
        numbers,
        size.batch_size,
        seed,
        count,
        size.length(maker.num_slots),
        padding={"tokens": ids.pad, "targets": ids.pad, "pictures": -1},
        rows=rows,
        num_workers=num_workers,
        lengths={"pictures": size.max_images, _COUNTED: size.max_seq_len},
        by=_COUNTED,
        finish=finish,
    )


def cached(encode: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """`encode` that remembers texts: the same captions come again in every epoch."""
    return functools.lru_cache(maxsize=1 << 17)(encode)
