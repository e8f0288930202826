"""`sequences.lay_out`, `mask` and `as_row` for many packed sequences at once, with the same result.

Sequences lie one after another in one array. Only what is random is drawn for each by itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.core.roles import IGNORED, MAIN, RETRIEVED, SENTINEL
from rag_mm.data import masking
from rag_mm.data.flat_documents import FlatDocuments, ranges
from rag_mm.data.sequences import PACKED, Layout
from rag_mm.data.vocabulary import Vocabulary

# The number of a sequence -> its own generator in its first state, which holds until the next call.
Generators = Callable[[int], np.random.Generator]


class JointTokens(NamedTuple):
    """N sequences of T tokens in all, without padding.

    Attributes:
        tokens: int32 [T].
        roles: int8 [T], the role of each token as a target (`core.roles`).
        firsts: int64 [N + 1]; sequence n has the tokens `firsts[n]` up to `firsts[n + 1]`.
        segments: int64 [S, 2], first token of every segment and the one after its last, before masking,
            counted from the first token of its sequence.
        first_segments: int64 [N + 1], as `firsts`, of the segments.
        main_segments: int64 [N], the first segment of each main document.
        is_image: bool [S].
    """

    tokens: np.ndarray
    roles: np.ndarray
    firsts: np.ndarray
    segments: np.ndarray
    first_segments: np.ndarray
    main_segments: np.ndarray
    is_image: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 [N]."""
        return np.diff(self.firsts)

    def segments_of(self, number: int) -> np.ndarray:
        """The segments of one sequence, int64 [S', 2]."""
        return self.segments[self.first_segments[number] : self.first_segments[number + 1]]


def lay_out_all(
    layout: Layout, vocabulary: Vocabulary, documents: FlatDocuments, num_docs: np.ndarray
) -> JointTokens:
    """The unmasked sequences of some documents.

    Args:
        layout: of kind packed.
        vocabulary: the ids, of one image size.
        documents: of all sequences, in sequence order: the retrieved ones of each, then its main document.
        num_docs: how many retrieved documents each sequence has, int [N].

    Raises:
        UserError: more documents than the layout holds.
        ValueError: a document does not fit the layout or the vocabulary, or the layout is of another kind.
    """
    if layout.kind != PACKED or vocabulary.image_sizes:
        raise ValueError("only packed sequences with images of one size are laid out together")
    if len(num_docs) and num_docs.max() > layout.max_docs:
        raise UserError(
            f"{num_docs.max()} documents were given, but the model takes at most {layout.max_docs};"
            " pass fewer."
        )
    _check_counts(layout, documents)
    mains = np.cumsum(num_docs + 1) - 1
    first_segments = documents.firsts[np.concatenate([[0], mains + 1])]
    main_segments = documents.firsts[mains]
    num_segments = np.diff(first_segments)
    sequence = np.repeat(np.arange(len(num_docs)), num_segments)
    # A sequence opens with one token, and one follows each segment.
    ends = np.cumsum(documents.lengths + 1) + sequence + 1
    starts = ends - documents.lengths - 1
    firsts = np.concatenate([[0], ends[first_segments[1:] - 1]])
    tokens = np.full(firsts[-1], vocabulary.brk, np.int32)
    tokens[firsts[:-1]] = tokens[firsts[1:] - 1] = vocabulary.eod
    offset = np.where(documents.is_image, vocabulary.code_offset, 0).astype(np.int32)
    ids = documents.ids[ranges(documents.starts, documents.lengths)]
    _check_ids(vocabulary, ids, np.repeat(documents.is_image, documents.lengths))
    tokens[ranges(starts, documents.lengths)] = ids + np.repeat(offset, documents.lengths)
    # The first token's role is that of what follows it.
    is_main = np.arange(len(sequence)) >= main_segments[sequence]
    after = documents.lengths + 1
    after[first_segments[:-1]] += 1
    roles = np.repeat(np.where(is_main, MAIN, RETRIEVED).astype(np.int8), after)
    segments = np.stack([starts, ends - 1], axis=1) - firsts[sequence][:, None]
    return JointTokens(
        tokens, roles, firsts, segments, first_segments, main_segments, documents.is_image
    )


def sample_all_spans(
    masks: masking.Masking, plain: JointTokens, generators: Generators, max_spans: int
) -> list[np.ndarray]:
    """`masking.sample_spans` of each sequence."""
    lengths = plain.lengths.tolist()
    return [
        masking.sample_spans(masks, plain.segments_of(i), generators(i), max_spans, length)
        for i, length in enumerate(lengths)
    ]


def mask_all(
    layout: Layout, vocabulary: Vocabulary, plain: JointTokens, spans: list[np.ndarray]
) -> JointTokens:
    """Moves spans of each sequence to its end; their tokens keep their roles.

    Args:
        layout: capacity of the sequences.
        vocabulary: the ids.
        plain: from `lay_out_all`.
        spans: int [n, 2] of each sequence, as for `sequences.mask`.

    Raises:
        ValueError: there are too many spans, or one is not inside a segment.
    """
    counts = np.array([len(each) for each in spans], np.int64)
    if not counts.any():
        return plain
    if counts.max() > layout.max_spans:
        raise ValueError(
            f"{counts.max()} spans do not fit a sequence with room for {layout.max_spans}"
        )
    marks = masking.make_marks(int(counts.max()), vocabulary)
    starts, ends = np.concatenate(spans).T + np.repeat(plain.firsts[:-1], counts)
    _check_spans(plain, starts, ends)
    source = _rearrange(plain.firsts, starts, ends, counts)
    numbers = ranges(np.zeros_like(counts), counts)
    # Behind the tokens lie the sentinel and the end of each span.
    tokens = np.concatenate([plain.tokens, marks[numbers], marks[-1:].repeat(len(numbers))])
    sentinels = np.full(len(starts), SENTINEL, np.int8)
    roles = np.concatenate([plain.roles, sentinels, plain.roles[starts]])
    return plain._replace(
        tokens=tokens[source],
        roles=roles[source],
        firsts=plain.firsts + 3 * np.concatenate([[0], np.cumsum(counts)]),
    )


def as_arrays(vocabulary: Vocabulary, sequences: JointTokens) -> dict[str, np.ndarray]:
    """The arrays [T] of `sequences.as_row`, of all sequences one after another."""
    targets, roles = np.roll(sequences.tokens, -1), np.roll(sequences.roles, -1)
    last = sequences.firsts[1:] - 1
    targets[last], roles[last] = vocabulary.pad, IGNORED
    positions = ranges(np.zeros(len(last), np.int64), sequences.lengths)
    return {
        "tokens": sequences.tokens,
        "targets": targets,
        "positions": positions.astype(np.int32),
        "segment_ids": np.ones(len(targets), np.int32),
        "roles": roles,
    }


def _rearrange(
    firsts: np.ndarray, starts: np.ndarray, ends: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Where each token of the masked sequences comes from, as `masking.rearrange` says for one.

    Args:
        firsts: of the sequences, int [N + 1].
        starts, ends: of all spans, counted from the first sequence's first token, int [M].
        counts: spans of each sequence, int [N].

    Returns:
        int64 [T + 3 M], indices into the T tokens, M sentinels and M ends of span.
    """
    num_tokens, num_spans = firsts[-1], len(starts)
    sentinel = num_tokens + np.arange(num_spans)
    before = np.cumsum(counts) - counts
    is_first = np.zeros(num_spans + 1, bool)
    is_first[before[counts > 0]] = True
    sequence = np.repeat(np.arange(len(counts)), counts)
    # Kept: what lies between the span before (or the sequence's start) and each span, its sentinel; at last
    # what follows a sequence's last span. Moved: sentinel, span, end of span.
    cursor = np.where(is_first[:-1], firsts[sequence], np.roll(ends, 1))
    rest = firsts[:-1].copy()
    has_any = counts > 0
    rest[has_any] = ends[(before + counts - 1)[has_any]]
    one = np.ones(num_spans, np.int64)
    pieces = [  # (sequence, place among the sequence's pieces, first token, number of tokens)
        (sequence, 0, cursor, starts - cursor),
        (sequence, 1, sentinel, one),
        (np.arange(len(counts)), 2, rest, firsts[1:] - rest),
        (sequence, 3, sentinel, one),
        (sequence, 4, starts, ends - starts),
        (sequence, 5, sentinel + num_spans, one),
    ]
    # In order of sequences; kept ones before the rest before moved ones; by span; by place.
    span = [np.arange(num_spans)] * 2 + [np.zeros(len(counts), int)] + [np.arange(num_spans)] * 3
    place = np.concatenate([np.full(len(piece[0]), piece[1]) for piece in pieces])
    group = np.searchsorted([2, 3], place, side="right")
    whose = np.concatenate([piece[0] for piece in pieces])
    order = np.lexsort((place, np.concatenate(span), group, whose))
    first = np.concatenate([piece[2] for piece in pieces])[order]
    return ranges(first, np.concatenate([piece[3] for piece in pieces])[order])


def _check_counts(layout: Layout, documents: FlatDocuments) -> None:
    """As `sequences.lay_out` checks: how many segments documents have and how long they are."""
    num_documents = len(documents.firsts) - 1
    counts = np.bincount(
        2 * documents.document + documents.is_image, minlength=2 * num_documents
    ).reshape(-1, 2)
    wrong = (documents.num_segments == 0) | (counts > [layout.num_texts, layout.num_images]).any(1)
    if wrong.any():
        texts, images = counts[wrong.argmax()]
        raise ValueError(
            f"a document of {texts} texts and {images} images does not fit {layout.num_texts} texts and "
            f"{layout.num_images} images"
        )
    capacity = np.where(documents.is_image, layout.num_codes, layout.max_text_len)
    if (documents.lengths > capacity).any():
        at = (documents.lengths > capacity).argmax()
        raise ValueError(f"{documents.lengths[at]} ids do not fit {capacity[at]} tokens")


def _check_ids(vocabulary: Vocabulary, ids: np.ndarray, is_code: np.ndarray) -> None:
    size = np.where(is_code, vocabulary.codebook_size, vocabulary.text_size)
    wrong = (ids < 0) | (ids >= size)
    if wrong.any():
        at = wrong.argmax()
        raise ValueError(f"the id {ids[at]} is not in [0, {size[at]})")


def _check_spans(plain: JointTokens, starts: np.ndarray, ends: np.ndarray) -> None:
    sequence = np.repeat(np.arange(len(plain.firsts) - 1), np.diff(plain.first_segments))
    segments = plain.segments + plain.firsts[sequence][:, None]
    at = np.searchsorted(segments[:, 0], starts, side="right") - 1
    is_inside = (at >= 0) & (starts < ends) & (ends <= segments[at, 1])
    if not is_inside.all() or (starts[1:] < ends[:-1]).any():
        raise ValueError("masked spans are not disjoint spans inside segments")
