"""Interleaved sequences as parts: texts, and numbers of pictures (Emu; docs/papers/emu.md).

Which pictures and texts of a document become a training sequence, whatever an image is made of.
"""

import enum
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from rag_mm.core.document_types import Document, Image, Text


class Mark(enum.Enum):
    """A part of a dialogue that is neither text nor picture: who speaks next, or the end of a turn."""

    USER = "user"
    ASSISTANT = "assistant"
    END = "end"


Ids = tuple[int, ...]  # Ids of a piece of a text.
Part = str | int | Mark | Ids  # A text or a piece of one, the number of a picture, or a mark.
Parts = tuple[Part, ...]
P = TypeVar("P")
NUM_FRAMES = 8  # Frames that stand for a video.


def frame_numbers(num_frames: int, count: int = NUM_FRAMES) -> list[int]:
    """Which of a video's frames stand for it: `count` at equal distances, some twice if it has fewer."""
    step = (num_frames - 1) / count
    return [min(int(step / 2) + round(i * step), num_frames - 1) for i in range(count)]


def parts_of(document: Document, number: Callable[[int, np.ndarray], int]) -> Parts:
    """The parts of a document; a video is `NUM_FRAMES` images.

    Args:
        document: texts, images and videos.
        number: number of the document's i-th picture, given i and its pixels, uint8 [H, W, 3].
    """
    parts: list[Part] = []
    count = 0
    for segment in document.segments:
        if isinstance(segment, Text):
            parts.append(segment.text)
        elif isinstance(segment, Image):
            parts.append(number(count, segment.pixels))
            count += 1
        else:
            frames = segment.frames
            parts += [number(count + i, frames[i]) for i in frame_numbers(len(frames))]
            count += len(frames)
    return tuple(parts)


def images_first(parts: Parts) -> Parts:
    """The images before the texts, each in their order."""
    return tuple(sorted(parts, key=lambda part: isinstance(part, str)))


def dialogue(
    turns: Sequence[tuple[Sequence[P], str | None]], system: str = ""
) -> tuple[P | str | Mark, ...]:
    """The parts of a dialogue: `<system> [USER]: <what is said> [ASSISTANT]: <answer></s>`, turn by turn.

    Args:
        turns: what the user says, images of any form first, and the answer; None where it is to be written.
        system: what comes first, such as what the assistant is told about images.
    """
    parts: list[P | str | Mark] = [system] if system else []
    for said, answer in turns:
        parts += [Mark.USER, *said, Mark.ASSISTANT]
        parts += [] if answer is None else [answer, Mark.END]
    return tuple(parts)


def window(
    parts: Parts,
    size_of: Callable[[Part], int],
    max_len: int,
    max_images: int,
    rng: np.random.Generator,
) -> Parts:
    """Successive parts that fit a sequence, from a random first part on (Emu: 1,024 tokens, 5 images).

    Args:
        parts: of the document.
        size_of: tokens of a part.
        max_len: tokens of the window; a part that is longer by itself ends it.
        max_images: images of the window.
        rng: chooses the first part, among those after which the window could not be longer.
    """
    ends = [_end(parts, start, size_of, max_len, max_images) for start in range(len(parts))]
    # A window that begins where another ends at the same part is but a piece of that.
    starts = [i for i, end in enumerate(ends) if end > i and (i == 0 or end > ends[i - 1])]
    if not starts:
        return ()
    first = starts[rng.integers(len(starts))]
    return parts[first : ends[first]]


def sampled_pairs(parts: Parts, count: int, rng: np.random.Generator) -> Parts:
    """Up to `count` images, each with the text after it, in the document's order (Emu's second kind)."""
    pairs = [
        i
        for i, (part, after) in enumerate(itertools.pairwise(parts))
        if isinstance(part, int) and isinstance(after, str)
    ]
    chosen = np.sort(rng.permutation(len(pairs))[:count])
    return tuple(part for i in chosen for part in parts[pairs[i] : pairs[i] + 2])


def _end(
    parts: Sequence[Part],
    start: int,
    size_of: Callable[[Part], int],
    max_len: int,
    max_images: int,
) -> int:
    """The part after the last of a window that begins at `start`."""
    length = images = 0
    for i in range(start, len(parts)):
        length += size_of(parts[i])
        images += isinstance(parts[i], int)
        if length > max_len or images > max_images:
            return i
    return len(parts)
