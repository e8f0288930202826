"""Training sequences and prompts: retrieved documents first, the main document last (docs/sequences.md).

A sequence is `EOD`, then the segments of each document with `BRK` after each, but `EOD` after the last:
`EOD (text BRK image BRK)xK text BRK image EOD` where every document is a text and an image. The spans that
masking moved follow. Two layouts differ in their position ids alone:

- `slots`: every document has a slot of fixed size, and every text and image room of fixed size in it; the
  main document is always in the last slot. A code and its copy in another document then differ by a
  constant offset, whatever the lengths of the texts. A moved token keeps the position it had.
- `packed`: positions run on, so that several sequences fill one row of a batch (`data.packing`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.core import checks
from rag_mm.core.errors import UserError
from rag_mm.core.roles import IGNORED, MAIN, RETRIEVED, SENTINEL
from rag_mm.data import masking
from rag_mm.data.token_documents import IMAGE, TEXT, Example, TokenSegment
from rag_mm.data.vocabulary import Vocabulary

SLOTS, PACKED = "slots", "packed"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The capacity of a sequence, and its position ids.

    Attributes:
        max_docs: maximum number of retrieved documents, in addition to the main one.
        max_text_len: maximum number of tokens in a text.
        num_codes: maximum number of codes in an image, and one more in vocabularies with several image sizes,
            whose images begin with a size token.
        max_spans: maximum number of masked spans.
        kind: slots | packed.
        max_seq_len: number of positions in packed sequences; not used by slots.
        num_texts: maximum number of texts in a document.
        num_images: maximum number of images in a document.
    """

    max_docs: int = 2
    max_text_len: int = 24
    num_codes: int = 64
    max_spans: int = 4
    kind: str = SLOTS
    max_seq_len: int = 0
    num_texts: int = 1
    num_images: int = 1

    def __post_init__(self):
        checks.at_least(self, 0, "max_docs", "max_spans", "num_texts", "num_images")
        checks.at_least(self, 1, "max_text_len", "num_codes")
        checks.one_of(self, "kind", (SLOTS, PACKED))
        if self.kind == PACKED and self.max_seq_len < self.length:
            raise UserError(
                f"max_seq_len is {self.max_seq_len}, but the main document and {self.max_docs} retrieved "
                f"ones can take {self.length} tokens; give at least that many, or fewer or shorter documents."
            )

    def capacity(self, kind: str) -> int:
        """Number of tokens reserved for a segment of kind `TEXT` or `IMAGE`."""
        return {TEXT: self.max_text_len, IMAGE: self.num_codes}[kind]

    @property
    def slot(self) -> int:
        """Number of tokens reserved for a document: its segments, and the `BRK` or `EOD` after each."""
        return sum(
            count * (self.capacity(kind) + 1)
            for kind, count in ((TEXT, self.num_texts), (IMAGE, self.num_images))
        )

    @property
    def unmasked_length(self) -> int:
        """Length of the longest sequence before masking: the opening EOD and all slots."""
        return 1 + (self.max_docs + 1) * self.slot

    @property
    def length(self) -> int:
        """Length of the longest sequence: masking adds three tokens per span."""
        return self.unmasked_length + 3 * self.max_spans

    def prompt_len(self, num_main: int) -> int:
        """Length of the longest prompt with `num_main` tokens after the retrieved documents."""
        return 1 + self.max_docs * self.slot + num_main

    @property
    def num_positions(self) -> int:
        """Upper bound of the position ids."""
        return self.max_seq_len if self.kind == PACKED else self.unmasked_length


class Tokens(NamedTuple):
    """A sequence without padding.

    Attributes:
        tokens, positions: int32 [T].
        roles: int8 [T], the role of each token as a target (`core.roles`).
        segments: int32 [S, 2], first token of every segment and the one after its last, before masking.
        is_maskable: bool [S], whether spans of a segment may be masked.
        num_retrieved: how many of the segments belong to retrieved documents.
        num_kept: number of tokens before the moved spans.
    """

    tokens: np.ndarray
    positions: np.ndarray
    roles: np.ndarray
    segments: np.ndarray
    is_maskable: np.ndarray
    num_retrieved: int
    num_kept: int

    @property
    def main(self) -> np.ndarray:
        """The segments of the main document, int32 [S', 2]."""
        return self.segments[self.num_retrieved :]


def lay_out(
    layout: Layout, vocabulary: Vocabulary, main: Example, docs: Sequence[Example] = ()
) -> Tokens:
    """The unmasked sequence of a main document and at most `max_docs` retrieved ones, in sequence order.

    The token after a segment has the segment's role.

    Raises:
        UserError: more documents than the layout holds.
        ValueError: a document does not fit the layout or the vocabulary.
    """
    if len(docs) > layout.max_docs:
        raise UserError(
            f"{len(docs)} documents were given, but the model takes at most {layout.max_docs};"
            " pass fewer."
        )
    # The opening EOD comes directly before the first used slot.
    start = (layout.max_docs - len(docs)) * layout.slot
    ids: list[np.ndarray | list[int]] = [[vocabulary.eod]]
    starts, roles = [start], [RETRIEVED if docs else MAIN]
    segments, is_maskable, end = [], [], 1
    for number, example in enumerate((*docs, main)):
        _check(layout, vocabulary, example)
        at = start + 1 + number * layout.slot
        for segment in example.segments:
            tokens = _tokens(vocabulary, segment)
            after = at + layout.capacity(segment.kind)
            ids += [tokens, [vocabulary.brk]]
            starts += [at, after]
            role = segment.role
            if role is None:
                role = MAIN if number == len(docs) else RETRIEVED
            roles += [role, role]
            segments.append((end + len(tokens) - len(segment.ids), end + len(tokens)))
            is_maskable.append(segment.is_maskable and role != IGNORED)
            at, end = after + 1, end + len(tokens) + 1
    ids[-1] = [vocabulary.eod]
    lengths = [len(part) for part in ids]
    tokens = np.concatenate(ids).astype(np.int32)
    # Positions count on from the start of each part.
    counts = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return Tokens(
        tokens=tokens,
        positions=_positions(layout, np.repeat(starts, lengths) + counts),
        roles=np.repeat(np.array(roles, np.int8), lengths),
        segments=np.array(segments, np.int32),
        is_maskable=np.array(is_maskable, bool),
        num_retrieved=len(segments) - len(main.segments),
        num_kept=len(tokens),
    )


def mask(layout: Layout, vocabulary: Vocabulary, plain: Tokens, spans: np.ndarray | None) -> Tokens:
    """Moves spans to the end; their tokens keep their roles, and in slots their positions.

    Args:
        layout: capacity of the sequence.
        vocabulary: the ids.
        plain: from `lay_out`.
        spans: int [n, 2] from `masking.sample_spans`, n at most `max_spans`; None moves nothing.

    Raises:
        ValueError: there are too many spans, or one is not inside a segment that may be masked.
    """
    if spans is None or not len(spans):
        return plain
    if len(spans) > layout.max_spans:
        raise ValueError(
            f"{len(spans)} spans do not fit a sequence with room for {layout.max_spans}"
        )
    starts, ends, count, length = spans[:, 0], spans[:, 1], len(spans), len(plain.tokens)
    segment = np.searchsorted(plain.segments[:, 0], starts, side="right") - 1
    is_inside = (segment >= 0) & (ends <= plain.segments[segment, 1])
    if not (is_inside & plain.is_maskable[segment]).all():
        raise ValueError(f"spans {spans.tolist()} are not inside {plain.segments.tolist()}")
    source, num_kept = masking.rearrange(length, spans)
    roles = np.concatenate([plain.roles, np.full(count, SENTINEL, np.int8), plain.roles[starts]])
    # A sentinel stands where its span began; when it opens the span at the end, one position earlier, so that
    # every moved token follows the position before its own.
    at = [plain.positions, plain.positions[starts], plain.positions[ends - 1] + 1]
    positions = np.concatenate(at)[source]
    opens = (source[num_kept:] >= length) & (source[num_kept:] < length + count)
    positions[num_kept:][opens] -= 1
    return plain._replace(
        tokens=np.concatenate([plain.tokens, masking.make_marks(count, vocabulary)])[source],
        positions=_positions(layout, positions),
        roles=roles[source],
        num_kept=num_kept,
    )


def make_row(
    layout: Layout,
    vocabulary: Vocabulary,
    main: Example,
    docs: Sequence[Example] = (),
    spans: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """A training sequence, padded to `layout.length` tokens; see `as_row`, `lay_out` and `mask`."""
    sequence = mask(layout, vocabulary, lay_out(layout, vocabulary, main, docs), spans)
    return as_row(vocabulary, sequence, layout.length)


def as_row(
    vocabulary: Vocabulary, sequence: Tokens, length: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays of a training batch, for one sequence.

    Args:
        vocabulary: the ids.
        sequence: from `lay_out` or `mask`.
        length: T, to which it is padded at the end; None for its own length.

    Returns:
        Arrays [T]. `tokens`, `targets` (the next token), `positions` and `segment_ids` (1, padding 0) are
        int32. `roles`, int8, is the role of the target; 0 in padding and where the sequence ends.

    Raises:
        ValueError: the sequence is longer than `length`.
    """
    n = len(sequence.tokens)
    length = n if length is None else length
    if length < n:
        raise ValueError(f"a sequence of {n} tokens does not fit {length}")
    tokens, targets = np.full((2, length), vocabulary.pad, np.int32)
    positions, segment_ids = np.zeros((2, length), np.int32)
    roles = np.full(length, IGNORED, np.int8)
    tokens[:n], targets[: n - 1] = sequence.tokens, sequence.tokens[1:]
    positions[:n], segment_ids[:n] = sequence.positions, 1
    roles[: n - 1] = sequence.roles[1:]
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


def continue_prompt(
    layout: Layout,
    vocabulary: Vocabulary,
    main: Example,
    segment: int,
    docs: Sequence[Example] = (),
    masked: Sequence[int] = (),
) -> Prompt:
    """Everything before segment `segment` of the main document, which the model is to write.

    An image's size token, where there is one, is part of the prompt. The ids of this and of later segments do
    not matter, nor do those of masked ones.

    Args:
        layout, vocabulary, docs: as for `lay_out`.
        main: the document.
        segment: number of the segment in `main`.
        masked: numbers of earlier segments that are masked whole, in order; a sentinel stands for each, as in
            a training sequence that masks them.

    Raises:
        ValueError: more segments are masked than the layout has spans.
    """
    if not len(main.segments[segment].ids):
        main = main.replace(segment, ids=[0])  # To be where the segment begins.
    for number in masked:
        main = main.replace(number, ids=[0])  # As long as its sentinel.
    parts = lay_out(layout, vocabulary, main, docs)
    if masked:
        parts = mask(layout, vocabulary, parts, parts.main[list(masked)])
    end = int(parts.main[segment, 0])
    return Prompt(parts.tokens[:end], parts.positions[:end], int(parts.positions[end]))


def fill_prompt(
    layout: Layout,
    vocabulary: Vocabulary,
    main: Example,
    segment: int,
    docs: Sequence[Example] = (),
    holes: Sequence[tuple[int, int]] = (),
    num_filled: int = 0,
) -> Prompt:
    """The sequence with holes in segment `segment` of the main document, up to where one is to be filled.

    A hole is a masked span: `EOD docs text BRK prefix S0 suffix EOD S0` continues with the tokens of the hole
    and `EOSS`. With several holes, those before the one to be filled are in the prompt, with the ids that
    `main` has there; the ids in it and in later ones do not matter.

    Args:
        layout, vocabulary, docs: as for `lay_out`.
        main: the document; a text that is to be written whole has any one token.
        segment: number of the segment in `main`.
        holes: ranges [start, end) of the segment's ids, ascending and disjoint; none: the whole segment.
        num_filled: number of holes before the one to be filled.

    Raises:
        ValueError: a hole is empty or outside of the segment, or the layout has fewer spans.
    """
    size = len(main.segments[segment].ids)
    spans = np.array(holes or [(0, size)], np.int32)
    if not ((spans[:, 0] >= 0) & (spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= size)).all():
        raise ValueError(f"holes {spans.tolist()} are not ranges inside {size} ids")
    plain = lay_out(layout, vocabulary, main, docs)
    masked = mask(layout, vocabulary, plain, spans + plain.main[segment, 0])
    end = masked.num_kept + 1 + int((spans[:num_filled, 1] - spans[:num_filled, 0] + 2).sum())
    return Prompt(masked.tokens[:end], masked.positions[:end], int(masked.positions[end - 1]) + 1)


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


def _tokens(vocabulary: Vocabulary, segment: TokenSegment) -> np.ndarray:
    ids = np.asarray(segment.ids, np.int32)
    if segment.kind == TEXT:
        return ids
    codes = ids + np.int32(vocabulary.code_offset)
    if not vocabulary.image_sizes:
        return codes
    return np.insert(codes, 0, vocabulary.size_token(segment.image_size))


def _positions(layout: Layout, positions: np.ndarray) -> np.ndarray:
    """Positions of the tokens in sequence order, int32 [T], from those in slots."""
    if layout.kind == PACKED:
        return np.arange(len(positions), dtype=np.int32)
    return positions.astype(np.int32)


def _check(layout: Layout, vocabulary: Vocabulary, example: Example) -> None:
    kinds = [segment.kind for segment in example.segments]
    if not kinds or kinds.count(TEXT) > layout.num_texts or kinds.count(IMAGE) > layout.num_images:
        raise ValueError(
            f"a document of {kinds} does not fit {layout.num_texts} texts and {layout.num_images} images"
        )
    for segment in example.segments:
        values = np.asarray(segment.ids)
        size = {TEXT: vocabulary.text_size, IMAGE: vocabulary.codebook_size}[segment.kind]
        capacity = layout.capacity(segment.kind)
        if segment.kind == IMAGE and vocabulary.image_sizes:
            capacity -= 1
        if values.ndim != 1 or len(values) > capacity:
            raise ValueError(
                f"{segment.kind} ids of shape {values.shape} do not fit {capacity} tokens"
            )
        if len(values) and not 0 <= values.min() <= values.max() < size:
            raise ValueError(
                f"{segment.kind} ids in [{values.min()}, {values.max()}] are not in [0, {size})"
            )
