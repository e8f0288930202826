"""Masking moves spans to the end, loses nothing, and has the statistics that were simulated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_mm.core.errors import UserError
from rag_mm.data import masking, sequences, token_documents, vocabulary

VOCABULARY = vocabulary.train_vocabulary([], 256, 64, 8)
V = VOCABULARY


def find_segments(num_docs, num_text, num_codes):
    """Segments of a row whose captions all have `num_text` tokens."""
    layout = sequences.Layout(num_docs, max(num_text, 1), num_codes)
    example = token_documents.pair([0] * num_text, np.zeros(num_codes, np.int32))
    return sequences.lay_out(layout, VOCABULARY, example, [example] * num_docs).segments


def mask(tokens, spans, vocab):
    """A masked sequence, as `sequences.mask` makes it from what this module says."""
    extended = np.concatenate([tokens, masking.make_marks(len(spans), vocab)])
    return extended[masking.rearrange(len(tokens), spans).source]


def test_worked_example():
    """`E t1 t2 B i1 i2 i3 i4 E`, span over i2..i3 -> `E t1 t2 B i1 S0 i4 E S0 i2 i3 X`."""
    e, b, s0, x = V.eod, V.brk, V.sentinel(0), V.eoss
    t1, t2, (i1, i2, i3, i4) = 11, 12, V.code_offset + np.arange(4)
    plain = np.array([e, t1, t2, b, i1, i2, i3, i4, e], np.int32)
    masked = mask(plain, np.array([[5, 7]]), VOCABULARY)
    assert masked.tolist() == [e, t1, t2, b, i1, s0, i4, e, s0, i2, i3, x]
    assert masking.unmask(masked, VOCABULARY).tolist() == plain.tolist()


def test_two_spans_keep_their_order_and_may_touch():
    plain = np.array([V.eod, 1, 2, 3, 4, V.eod], np.int32)
    masked = mask(plain, np.array([[1, 3], [3, 4]]), VOCABULARY)
    s0, s1 = V.sentinel(0), V.sentinel(1)
    moved = [s0, 1, 2, V.eoss, s1, 3, V.eoss]
    assert masked.tolist() == [V.eod, s0, s1, 4, V.eod, *moved]
    assert masking.unmask(masked, VOCABULARY).tolist() == plain.tolist()


@given(
    seed=st.integers(0, 2**32 - 1),
    num_docs=st.integers(0, 3),
    num_text=st.integers(0, 6),
    num_codes=st.integers(1, 9),
    max_spans=st.integers(0, 8),
    min_spans=st.integers(0, 1),
    segment_mask_prob=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_unmasking_restores_every_row(
    seed, num_docs, num_text, num_codes, max_spans, min_spans, segment_mask_prob
):
    rng = np.random.default_rng(seed)
    segments = find_segments(num_docs, num_text, num_codes)
    options = masking.Masking(min_spans, segment_mask_prob)
    spans = masking.sample_spans(options, segments, rng, max_spans)

    assert len(spans) <= max_spans and spans.dtype == np.int32
    assert len(spans) >= min(min_spans, max_spans)
    assert (spans[:, 0] < spans[:, 1]).all() and (spans[1:, 0] >= spans[:-1, 1]).all()
    for start, end in spans:
        assert any(start >= s and end <= e for s, e in segments)

    plain = np.full(segments[-1, 1] + 1, V.brk, np.int32)
    plain[[0, -1]] = V.eod
    for start, end in segments:
        plain[start:end] = rng.integers(0, V.text_size, end - start)
    masked = mask(plain, spans, VOCABULARY)
    assert len(masked) == len(plain) + 3 * len(spans)
    assert masking.unmask(masked, VOCABULARY).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("num_docs", "min_spans", "plain_share", "masked_share"),
    [(0, 0, 0.37, 0.25), (2, 0, 0.37, 0.16), (2, 1, 0.0, 0.24)],
)
def test_statistics_match_the_public_sampler(num_docs, min_spans, plain_share, masked_share):
    """Simulated statistics of 20-token captions with 1024-token images."""
    segments = find_segments(num_docs, 20, 1024)
    rng = np.random.default_rng(0)
    options = masking.Masking(min_spans)
    draws = [masking.sample_spans(options, segments, rng, 16) for _ in range(4000)]
    lengths = np.concatenate([spans[:, 1] - spans[:, 0] for spans in draws])
    in_caption = np.isin(
        np.searchsorted(segments[:, 0], np.concatenate(draws)[:, 0], side="right") - 1,
        np.arange(0, len(segments), 2),
    )
    assert np.mean([len(spans) == 0 for spans in draws]) == pytest.approx(plain_share, abs=0.025)
    assert lengths.sum() / len(draws) / segments[-1, 1] == pytest.approx(masked_share, abs=0.015)
    assert in_caption.mean() < 0.005


def test_short_images_put_some_spans_in_captions_and_whole_segments_put_half():
    segments = find_segments(2, 12, 64)
    rng = np.random.default_rng(0)
    shares = []
    for segment_mask_prob in (0.0, 1.0):
        options = masking.Masking(1, segment_mask_prob)
        draws = [masking.sample_spans(options, segments, rng, 4) for _ in range(3000)]
        starts = np.concatenate(draws)[:, 0]
        text = (np.searchsorted(segments[:, 0], starts, side="right") - 1) % 2 == 0
        shares.append(text.mean())
    assert 0.03 < shares[0] < 0.1
    assert shares[1] == pytest.approx(0.5, abs=0.03)


def test_whole_segments_are_masked_whole_and_once():
    segments = find_segments(1, 3, 5)
    whole = {tuple(segment) for segment in segments.tolist()}
    rng = np.random.default_rng(0)
    for _ in range(200):
        spans = masking.sample_spans(masking.Masking(1, 1.0), segments, rng, 4)
        drawn = [tuple(span) for span in spans.tolist()]
        assert set(drawn) <= whole and len(set(drawn)) == len(drawn)


def test_mask_probability_leaves_rows_plain():
    segments = find_segments(1, 3, 5)
    rng = np.random.default_rng(0)
    for probability in (0.0, 0.3, 1.0):
        options = masking.Masking(min_spans=1, mask_prob=probability)
        masked = [len(masking.sample_spans(options, segments, rng, 4)) > 0 for _ in range(2000)]
        assert np.mean(masked) == pytest.approx(probability, abs=0.04)


def test_the_generator_decides_everything():
    segments = find_segments(2, 12, 64)
    options = masking.Masking(1, 0.3)
    first, second = (
        [masking.sample_spans(options, segments, rng, 4).tolist() for _ in range(50)]
        for rng in (np.random.default_rng((7, 1)), np.random.default_rng((7, 1)))
    )
    assert first == second


@pytest.mark.parametrize(
    "spans", [[[0, 2]], [[2, 2]], [[3, 2]], [[1, 3], [2, 4]], [[3, 4], [1, 2]], [[1, 7]]]
)
def test_bad_spans_are_refused(spans):
    plain = np.array([V.eod, 1, 2, 3, 4, V.eod], np.int32)
    with pytest.raises(ValueError, match="disjoint"):
        mask(plain, np.array(spans), VOCABULARY)


def test_more_spans_than_sentinels_are_refused():
    plain = np.arange(20, dtype=np.int32)
    spans = np.arange(1, 19).reshape(9, 2)
    with pytest.raises(ValueError, match="9 spans"):
        mask(plain, spans, VOCABULARY)


def test_a_row_that_no_masking_makes_is_refused():
    s0, s1, x = V.sentinel(0), V.sentinel(1), V.eoss
    for tokens in (
        [V.eod, s0, V.eod, s0, 5],  # The span was never closed.
        [V.eod, s0, V.eod, 5, x],  # It was never opened.
        [V.eod, s0, V.eod, s1, 5, x],
        [V.eod, s0, V.eod, s0, 5, x, x],
        [V.eod, 5, x, V.eod],
    ):
        with pytest.raises(ValueError, match="not a masked sequence"):
            masking.unmask(tokens, VOCABULARY)


def test_options_out_of_range_are_named():
    with pytest.raises(UserError, match="min_spans is 2"):
        masking.Masking(min_spans=2)
    with pytest.raises(UserError, match=r"segment_mask_prob is 1\.5"):
        masking.Masking(segment_mask_prob=1.5)
