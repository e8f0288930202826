"""Training sequences and prompts: retrieved documents first, the main document last (docs/papers/ra_cm3.md).

A sequence is `EOD (text BRK image BRK)xK text BRK image EOD`, followed by the spans that masking moved. Every
document has a slot of fixed size; the main document is always in the last. Position ids count through the
slots, including their unused part, so a code and its copy in another slot differ by a constant offset,
whatever the lengths of the texts.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.core.roles import IGNORED, MAIN, RETRIEVED, SENTINEL
from rag_mm.data import masking
from rag_mm.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Layout:
    """The capacity of a sequence.

    Attributes:
        max_docs: maximum number of retrieved documents, in addition to the main one.
        max_text_len: maximum number of text tokens per document.
        num_codes: number of image codes per document.
        max_spans: maximum number of masked spans.
    """

    max_docs: int = 2
    max_text_len: int = 24
    num_codes: int = 64
    max_spans: int = 4

    def __post_init__(self):
        for name, least in (
            ("max_docs", 0),
            ("max_text_len", 1),
            ("num_codes", 1),
            ("max_spans", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; give at least {least}.")

    @property
    def slot(self) -> int:
        """Number of positions per document: text, BRK, image, and the closing BRK or EOD."""
        return self.max_text_len + 1 + self.num_codes + 1

    @property
    def moved_start(self) -> int:
        """Position of the first moved token, whatever the length of the documents."""
        return 1 + (self.max_docs + 1) * self.slot

    @property
    def length(self) -> int:
        """Length of the longest sequence: the opening EOD, all slots, and three tokens per span."""
        return self.moved_start + 3 * self.max_spans

    @property
    def num_positions(self) -> int:
        """Upper bound of the position ids: all texts and images moved, with two marks per span."""
        num_content_tokens = (self.max_docs + 1) * (self.max_text_len + self.num_codes)
        return self.moved_start + num_content_tokens + 2 * self.max_spans


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document as tokens.

    Attributes:
        text: text ids.
        codes: int32 [num_codes], codes in the codebook.
        num_cut: number of text tokens that were cut off.
    """

    text: Sequence[int]
    codes: np.ndarray
    num_cut: int = 0


def encode_text(layout: Layout, vocabulary: Vocabulary, text: str) -> tuple[list[int], int]:
    """The first `max_text_len` ids of `text`, and the number of ids cut off."""
    ids = vocabulary.encode_text(text)
    return ids[: layout.max_text_len], max(0, len(ids) - layout.max_text_len)


def make_example(layout: Layout, vocabulary: Vocabulary, text: str, codes: np.ndarray) -> Example:
    """Encodes `text`, cut to `max_text_len` tokens; `codes` is int [num_codes]."""
    ids, num_cut = encode_text(layout, vocabulary, text)
    return Example(ids, np.asarray(codes, np.int32), num_cut)


def find_segments(layout: Layout, main: Example, docs: Sequence[Example] = ()) -> np.ndarray:
    """Segments of the unmasked sequence: int32 [2 (K + 1), 2], text and image of each document in turn.

    Start and end are token indices. The last two segments are the main text and the main image. The target
    of token t is token t + 1, so the indices of targets are smaller by one.
    """
    lengths = np.array([len(example.text) for example in (*docs, main)])
    closing = np.cumsum(lengths + layout.num_codes + 2)
    image = closing - layout.num_codes
    text = image - 1 - lengths
    return np.stack([text, image - 1, image, closing], 1).reshape(-1, 2).astype(np.int32)


def make_row(
    layout: Layout,
    vocabulary: Vocabulary,
    main: Example,
    docs: Sequence[Example] = (),
    spans: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Makes one training sequence, padded at the end.

    Args:
        layout: capacity of the sequence.
        vocabulary: the ids.
        main: the document to model.
        docs: at most `max_docs` retrieved documents, in sequence order.
        spans: int [n, 2] from `masking.sample_spans`, n at most `max_spans`; None masks nothing.

    Returns:
        Arrays [layout.length]. `tokens`, `targets` (the next token), `positions` and
        `segment_ids` (1, padding 0) are int32. `roles`, int8, is the role of the target: 1 belongs to
        the main document, 2 to a retrieved one (including its BRK and moved spans), 3 is a sentinel, 0
        padding.

    Raises:
        UserError: more documents than the layout holds.
        ValueError: text, codes or spans do not fit.
    """
    parts = _mask(layout, vocabulary, _lay_out(layout, vocabulary, main, docs), spans)
    n = len(parts.tokens)
    tokens = np.full(layout.length, vocabulary.pad, np.int32)
    targets = tokens.copy()
    positions, segment_ids = np.zeros((2, layout.length), np.int32)
    roles = np.full(layout.length, IGNORED, np.int8)
    tokens[:n] = parts.tokens
    targets[: n - 1] = parts.tokens[1:]
    positions[:n] = parts.positions
    segment_ids[:n] = 1
    roles[: n - 1] = parts.roles[1:]
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segment_ids": segment_ids,
        "roles": roles,
    }


class Prompt(NamedTuple):
    """The beginning of a sequence; generated tokens continue from position `next_position`.

    `tokens` and `positions` are int32 [T].
    """

    tokens: np.ndarray
    positions: np.ndarray
    next_position: int


def caption_to_image_prompt(
    layout: Layout, vocabulary: Vocabulary, text: Sequence[int], docs: Sequence[Example] = ()
) -> Prompt:
    """`EOD docs text BRK`; the model continues with `num_codes` codes."""
    main = Example(text, np.zeros(layout.num_codes, np.int32))
    parts = _lay_out(layout, vocabulary, main, docs)
    end = int(parts.segments[-1, 0])
    return Prompt(parts.tokens[:end], parts.positions[:end], int(parts.positions[end]))


def image_to_caption_prompt(
    layout: Layout, vocabulary: Vocabulary, codes: np.ndarray, docs: Sequence[Example] = ()
) -> Prompt:
    """`EOD docs S0 BRK image EOD S0`; the model continues with the caption and `eoss`."""
    main = Example([0], codes)  # An arbitrary token, which the sentinel replaces.
    parts = _lay_out(layout, vocabulary, main, docs)
    return _infill_prompt(layout, vocabulary, parts, parts.segments[-2])


def infill_prompt(
    layout: Layout,
    vocabulary: Vocabulary,
    main: Example,
    start: int,
    end: int,
    docs: Sequence[Example] = (),
) -> Prompt:
    """`EOD docs text BRK prefix S0 suffix EOD S0`; the model continues with codes [start, end) and `eoss`.

    The codes of `main` in [start, end) are ignored.

    Raises:
        ValueError: the range is empty or outside of the image.
    """
    if not 0 <= start < end <= layout.num_codes:
        raise ValueError(f"codes [{start}, {end}) are not a range inside {layout.num_codes} codes")
    parts = _lay_out(layout, vocabulary, main, docs)
    return _infill_prompt(layout, vocabulary, parts, parts.segments[-1, 0] + np.array([start, end]))


def stack_prompts(
    prompts: Sequence[Prompt], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stacks prompts of different lengths into one batch, padded on the left.

    Returns:
        tokens, positions, segment_ids (1, padding 0), each int32 [B, length]; padding is zero.

    Raises:
        ValueError: a prompt is longer than `length`.
    """
    tokens, positions, segment_ids = np.zeros((3, len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        first = length - len(prompt.tokens)
        if first < 0:
            raise ValueError(f"a prompt of {len(prompt.tokens)} tokens is longer than {length}")
        tokens[row, first:] = prompt.tokens
        positions[row, first:] = prompt.positions
        segment_ids[row, first:] = 1
    return tokens, positions, segment_ids


class _Parts(NamedTuple):
    """A sequence without padding; `roles` are those of the tokens, not of their targets."""

    tokens: np.ndarray
    positions: np.ndarray
    roles: np.ndarray
    segments: np.ndarray
    num_kept: int


def _lay_out(
    layout: Layout, vocabulary: Vocabulary, main: Example, docs: Sequence[Example]
) -> _Parts:
    """Lays out the unmasked sequence."""
    _check(layout, vocabulary, main, docs)
    examples = (*docs, main)
    grid = np.full(
        (len(examples), layout.slot), -1, np.int32
    )  # -1: unused space after a short text.
    for i, example in enumerate(examples):
        grid[i, : len(example.text)] = example.text
        grid[i, layout.max_text_len + 1 : -1] = example.codes
    grid[:, layout.max_text_len + 1 : -1] += vocabulary.code_offset
    grid[:, layout.max_text_len] = grid[:, -1] = vocabulary.brk
    grid[-1, -1] = vocabulary.eod
    cells = np.flatnonzero(grid >= 0)
    # The opening EOD comes directly before the first used slot.
    first_position = (layout.max_docs - len(docs)) * layout.slot
    tokens = np.concatenate([[vocabulary.eod], grid.ravel()[cells]]).astype(np.int32)
    positions = np.concatenate([[first_position], first_position + 1 + cells]).astype(np.int32)
    roles = np.full(len(tokens), RETRIEVED, np.int8)
    segments = find_segments(layout, main, docs)
    roles[segments[-2, 0] :] = MAIN
    return _Parts(tokens, positions, roles, segments, len(tokens))


def _check(layout: Layout, vocabulary: Vocabulary, main: Example, docs: Sequence[Example]) -> None:
    if len(docs) > layout.max_docs:
        raise UserError(
            f"{len(docs)} documents were given, but the model takes at most {layout.max_docs};"
            " pass fewer."
        )
    for example in (*docs, main):
        codes = example.codes
        if len(example.text) > layout.max_text_len:
            raise ValueError(
                f"a text of {len(example.text)} tokens is longer than {layout.max_text_len};"
                " make examples with make_example"
            )
        if len(example.text) and not 0 <= min(example.text) <= max(example.text) < (
            vocabulary.text_size
        ):
            raise ValueError(f"text ids {list(example.text)} are not below {vocabulary.text_size}")
        if codes.shape != (layout.num_codes,):
            raise ValueError(f"codes have shape {codes.shape}, not ({layout.num_codes},)")
        if codes.min() < 0 or codes.max() >= vocabulary.codebook_size:
            raise ValueError(
                f"codes are in [{codes.min()}, {codes.max()}], outside of the codebook's"
                f" [0, {vocabulary.codebook_size})"
            )


def _mask(
    layout: Layout, vocabulary: Vocabulary, parts: _Parts, spans: np.ndarray | None
) -> _Parts:
    """Moves `spans`; moved tokens keep their role and get the positions from `moved_start` on."""
    if spans is None or not len(spans):
        return parts
    if len(spans) > layout.max_spans:
        raise ValueError(
            f"{len(spans)} spans do not fit a sequence with room for {layout.max_spans}"
        )
    starts, ends = spans[:, 0], spans[:, 1]
    segment = np.searchsorted(parts.segments[:, 0], starts, side="right") - 1
    if (segment < 0).any() or (ends > parts.segments[segment, 1]).any():
        raise ValueError(f"spans {spans.tolist()} are not inside {parts.segments.tolist()}")
    source, num_kept = masking.rearrange(len(parts.tokens), spans)
    marks = masking.make_marks(len(spans), vocabulary)
    tokens = np.concatenate([parts.tokens, marks])[source]
    roles = np.concatenate(
        [parts.roles, np.full(len(spans), SENTINEL, np.int8), parts.roles[starts]]
    )
    # A sentinel in place gets the position of its span's start; marks at the end are renumbered below.
    marks_at = np.tile(parts.positions[starts], 2)
    positions = np.concatenate([parts.positions, marks_at])[source]
    positions[num_kept:] = layout.moved_start + np.arange(len(source) - num_kept)
    return _Parts(tokens, positions, roles[source], parts.segments, num_kept)


def _infill_prompt(
    layout: Layout, vocabulary: Vocabulary, parts: _Parts, span: np.ndarray
) -> Prompt:
    masked = _mask(layout, vocabulary, parts, span[None])
    end = masked.num_kept + 1
    return Prompt(masked.tokens[:end], masked.positions[:end], layout.moved_start + 1)
