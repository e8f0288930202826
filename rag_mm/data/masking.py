"""CM3 masking: moves spans to the end of the sequence, after the context on both sides (CM3, section 2).

The segments of a sequence are the runs of tokens between breaks and ends of documents. `sample_spans` samples
spans inside segments, `rearrange` computes where each token of the masked sequence comes from, and `unmask`
inverts the masking. Each span adds three tokens; sequences reserve room for them, so nothing is truncated.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Masking:
    """How spans are sampled.

    Attributes:
        min_spans: 0 as in the public code (37 % of sequences stay unmasked) or 1 as in the paper.
        segment_mask_prob: probability of masking whole segments instead of random spans; without it
            captions, which are short, are hardly ever masked.
        mask_prob: probability that a sequence is masked at all.
    """

    min_spans: int = 0
    segment_mask_prob: float = 0.0
    mask_prob: float = 1.0

    def __post_init__(self):
        if self.min_spans not in (0, 1):
            raise UserError(f"min_spans is {self.min_spans!r}; give 0 or 1.")
        for name in ("segment_mask_prob", "mask_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)!r}; give a number in [0, 1].")


def sample_spans(
    masking: Masking,
    segments: np.ndarray,
    rng: np.random.Generator,
    max_spans: int,
    length: int | None = None,
) -> np.ndarray:
    """Samples `n ~ clip(Poisson(1), min_spans, max_spans)` spans, each inside one segment.

    End points are uniform over the whole sequence, including retrieved documents, so long segments are
    masked more often. A span is clipped to the segment that it overlaps most. Empty spans, spans on a
    boundary token and overlapping spans are rejected, which can leave fewer than n spans but, for n > 0,
    at least one. Whole segments (`segment_mask_prob`) are chosen uniformly instead.

    Args:
        masking: the probabilities.
        segments: int [num_segments, 2], start and end of each segment that may be masked, ascending. Empty
            segments are never masked.
        rng: the source of all randomness.
        max_spans: maximum number of spans that the sequence has room for.
        length: number of tokens of the sequence; None: one boundary token follows the last segment.

    Returns:
        int32 [n, 2], start and end of each span, ascending and disjoint.
    """
    if length is None:
        length = int(segments[-1, 1]) + 1
    num_spans = min(max(int(rng.poisson(1.0)), masking.min_spans), max_spans)
    if not num_spans:
        return np.zeros((0, 2), np.int32)
    segments = segments[segments[:, 0] < segments[:, 1]]
    if not len(segments) or rng.random() >= masking.mask_prob:
        return np.zeros((0, 2), np.int32)
    if rng.random() < masking.segment_mask_prob:
        selected = rng.permutation(len(segments))[:num_spans]
        return segments[np.sort(selected)].astype(np.int32)
    spans: list[tuple[int, int]] = []
    while not spans:
        spans = _sample_disjoint_spans(segments, length, num_spans, rng)
    return np.array(sorted(spans), np.int32)


def _sample_disjoint_spans(
    segments: np.ndarray, length: int, num_spans: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """The first `num_spans` valid, disjoint spans of `num_spans**2` candidates."""
    accepted: list[tuple[int, int]] = []
    clipped: list[tuple[int, int]] = []
    for low, high in np.sort(rng.random((num_spans**2, 2)), axis=1).tolist():
        start, end = max(1, int(low * length)), int(high * length + 0.5)
        if end <= start or any(start < e and s < end for s, e in accepted):
            continue
        overlaps = np.minimum(segments[:, 1], end) - np.maximum(segments[:, 0], start)
        best = int(overlaps.argmax())
        if overlaps[best] <= 0:  # The span covers only a boundary token.
            continue
        accepted.append((start, end))
        clipped.append((max(start, int(segments[best, 0])), min(end, int(segments[best, 1]))))
        if len(accepted) == num_spans:
            break
    return clipped


class Rearranged(NamedTuple):
    """Where the tokens of a masked sequence come from.

    Attributes:
        source: int32 [num_tokens + 3 n], indices into the unmasked sequence followed by n sentinels
            and n ends of span (one `eoss` for each span).
        num_kept: number of tokens before the moved spans, including the sentinels in place.
    """

    source: np.ndarray
    num_kept: int


def rearrange(num_tokens: int, spans: np.ndarray) -> Rearranged:
    """Replaces span i by sentinel i and appends `sentinel i, span i, eoss` for each span, in order.

    Args:
        num_tokens: length of the unmasked sequence.
        spans: int [n, 2], ascending, disjoint and not empty; no span contains the first token.

    Raises:
        ValueError: the spans violate these conditions.
    """
    starts, ends = spans[:, 0], spans[:, 1]
    if len(spans) and (
        starts[0] < 1
        or ends[-1] > num_tokens
        or (starts >= ends).any()
        or (starts[1:] < ends[:-1]).any()
    ):
        raise ValueError(f"spans {spans.tolist()} are not disjoint spans of {num_tokens} tokens")
    indices = np.arange(num_tokens + 2 * len(spans), dtype=np.int32)
    kept, moved, cursor = [], [], 0
    for i, (start, end) in enumerate(spans.tolist()):
        sentinel = num_tokens + i
        eoss = sentinel + len(spans)
        kept += [indices[cursor:start], indices[sentinel : sentinel + 1]]
        moved += [indices[sentinel : sentinel + 1], indices[start:end]]
        moved.append(indices[eoss : eoss + 1])
        cursor = end
    kept.append(indices[cursor:num_tokens])
    num_kept = num_tokens + len(spans) - int((ends - starts).sum())
    return Rearranged(np.concatenate(kept + moved), num_kept)


def make_marks(num_spans: int, vocabulary: Vocabulary) -> np.ndarray:
    """What `Rearranged.source` expects after the unmasked sequence: sentinels 0..n-1, then n `eoss`.

    Raises:
        ValueError: the vocabulary has fewer sentinels.
    """
    if num_spans > vocabulary.num_sentinels:
        raise ValueError(f"{num_spans} spans need more than {vocabulary.num_sentinels} sentinels")
    marks = np.full(2 * num_spans, vocabulary.eoss, np.int32)
    marks[:num_spans] = vocabulary.sentinel(0) + np.arange(num_spans)
    return marks


def unmask(tokens: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Recovers the unmasked sequence int32 [T - 3 n] from a masked one [T] with n spans and no padding.

    Raises:
        ValueError: the sequence is not a masked one, which can happen if a model generated its end.
    """
    tokens = np.asarray(tokens, np.int32)
    first = vocabulary.sentinel(0)
    sentinels = np.flatnonzero((tokens >= first) & (tokens < first + vocabulary.num_sentinels))
    num_spans = len(sentinels) // 2
    order = np.tile(np.arange(num_spans), 2)
    eoss = np.flatnonzero(tokens == vocabulary.eoss)
    span_ends = np.append(sentinels[num_spans + 1 :], len(tokens)) - 1 if num_spans else sentinels
    if not np.array_equal(tokens[sentinels] - first, order) or not np.array_equal(eoss, span_ends):
        raise ValueError("not a masked sequence: its sentinels and ends of span do not pair")
    pieces, cursor = [], 0
    for i in range(num_spans):
        pieces.append(tokens[cursor : sentinels[i]])
        pieces.append(tokens[sentinels[num_spans + i] + 1 : span_ends[i]])
        cursor = sentinels[i] + 1
    pieces.append(tokens[cursor : sentinels[num_spans] if num_spans else len(tokens)])
    return np.concatenate(pieces)
