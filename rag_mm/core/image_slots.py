"""Sequences of ids in which images have slots: `[IMG]`, N x `<image>`, `[/IMG]`, as in Emu.

A model puts vectors in place of the `<image>` ids. Which vector stands where is an array beside the ids:
`slot`, image number in the row * N + k at the k-th slot of an image, -1 elsewhere.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.core import checks
from rag_mm.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class SlotTokens:
    """Ids of the tokens that a sequence with images needs; the defaults are those of Emu's LLaMA.

    Attributes:
        begin: begins a sequence.
        end: ends a sequence.
        pad: fills the end of a row.
        image: `[IMG]`, before an image's slots.
        end_image: `[/IMG]`, after them.
        slot: `<image>`, in place of which a vector stands.
    """

    begin: int = 1
    end: int = 2
    pad: int = 32_000
    image: int = 32_001
    end_image: int = 32_002
    slot: int = 32_003

    def __post_init__(self):
        checks.at_least(self, 0, *vars(self))
        if len(set(vars(self).values())) != len(vars(self)):
            raise ValueError(f"two of the special tokens have one id: {vars(self)}")


class SlottedIds(NamedTuple):
    """Ids of a sequence, and where images stand in it.

    Attributes:
        tokens: int32 [T].
        slot: int32 [T], image number * N + k at slots, -1 elsewhere.
    """

    tokens: np.ndarray
    slot: np.ndarray


def interleave(
    parts: Sequence[Sequence[int] | None],
    ids: SlotTokens,
    num_slots: int,
    *,
    has_end: bool = False,
    starts_image: bool = False,
) -> SlottedIds:
    """`begin`, then the parts in their order.

    Args:
        parts: ids of a text; or None for an image, numbered from 0 in the order of the sequence.
        ids: the special tokens.
        num_slots: N, slots of an image.
        has_end: whether `end` follows, as in training.
        starts_image: whether `image` follows, after which a model writes an image.
    """
    tokens, slot, num_images = [ids.begin], [-1], 0
    for part in parts:
        if part is None:
            tokens += [ids.image, *[ids.slot] * num_slots, ids.end_image]
            first = num_images * num_slots
            slot += [-1, *range(first, first + num_slots), -1]
            num_images += 1
        else:
            tokens += map(int, part)
            slot += [-1] * len(part)
    last = [ids.end] * has_end + [ids.image] * starts_image
    return SlottedIds(
        np.array(tokens + last, np.int32), np.array(slot + [-1] * len(last), np.int32)
    )


def check(
    tokens: np.ndarray, slot: np.ndarray, num_images: int, ids: SlotTokens, num_slots: int
) -> None:
    """Checks on the host that there is a vector for every slot and a slot for every vector.

    Args:
        tokens, slot: int32 [T], of one row.
        num_images: images whose vectors there are.
        ids: the special tokens.
        num_slots: N, slots of an image.

    Raises:
        UserError: there are more images than slots, or more slots than images; or ids and `slot` differ on
            where the slots are.
    """
    is_slot = tokens == ids.slot
    if (is_slot != (slot >= 0)).any():
        raise UserError(
            "The ids of a row and its slots do not agree; make both with image_slots.interleave."
        )
    count = int(is_slot.sum())
    if count != num_images * num_slots:
        raise UserError(
            f"{num_images} images of {num_slots} vectors do not fit {count} slots; give one image for each "
            f"{num_slots} slots."
        )
    if not np.array_equal(np.sort(slot[is_slot]), np.arange(count)):
        raise UserError(f"The slots of a row are not 0 to {count - 1}, each once.")
