"""Sequences that are drawn together are those that are drawn one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_mm.core.errors import UserError
from rag_mm.corpus.token_record import TokenDocument, TokenFormat
from rag_mm.data import sequences, vocabulary
from rag_mm.data.token_documents import IMAGE, TEXT, Example, TokenSegment
from rag_mm.stages.ra_cm3.drawn_sequences import MaskingConfig, SequenceDraws

V = vocabulary.train_vocabulary([], 256, 64, 4)
FORMAT = TokenFormat(V.text_size, V.codebook_size)
MAX_DOCS, MAX_TEXT, NUM_CODES = 2, 5, 6
LAYOUT = sequences.Layout(
    MAX_DOCS, MAX_TEXT, NUM_CODES, 4, sequences.PACKED, 256, num_texts=2, num_images=2
)
SHAPES = [(TEXT, IMAGE), (IMAGE,), (TEXT,), (IMAGE, TEXT), (TEXT, IMAGE, TEXT, IMAGE)]


def make_example(rng):
    shape = SHAPES[rng.integers(len(SHAPES))]
    sizes = [rng.integers(0, MAX_TEXT + 1) if k == TEXT else NUM_CODES for k in shape]
    top = {TEXT: V.text_size, IMAGE: V.codebook_size}
    return Example(
        tuple(
            TokenSegment(kind, rng.integers(0, top[kind], size))
            for kind, size in zip(shape, sizes, strict=True)
        )
    )


def flatten(examples):
    return FORMAT.read_flat(
        [FORMAT.to_bytes(TokenDocument("name", None, None, example)) for example in examples]
    )


def generator(number):
    return np.random.Generator(np.random.Philox(key=[7, number]))


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 9),
    max_spans=st.sampled_from([0, 1, 4]),
    prob=st.sampled_from([0.0, 1.0]),
    segment_prob=st.sampled_from([0.0, 0.5]),
    caption_prob=st.sampled_from([0.0, 0.5]),
    min_spans=st.sampled_from([0, 1]),
    noise=st.sampled_from([0.0, 0.5]),
    image_first=st.sampled_from([0.0, 0.5]),
)
def test_sequences_do_not_depend_on_those_beside_them(
    seed, count, max_spans, prob, segment_prob, caption_prob, min_spans, noise, image_first
):
    if caption_prob and not max_spans:
        caption_prob = 0.0
    rng = np.random.default_rng(seed)
    mains = [make_example(rng) for _ in range(count)]
    docs = [[make_example(rng) for _ in range(rng.integers(MAX_DOCS + 1))] for _ in range(count)]
    masks = MaskingConfig(max_spans, prob, segment_prob, caption_prob, min_spans)
    draws = SequenceDraws(LAYOUT, V, masks, noise, image_first)
    documents = flatten(
        [e for group, main in zip(docs, mains, strict=True) for e in (*group, main)]
    )
    rows, lengths = draws.draw_all(documents, np.array([len(d) for d in docs]), generator)
    one_by_one = [draws.draw(mains[i], docs[i], generator(i)) for i in range(count)]
    assert lengths.tolist() == [len(row["tokens"]) for row in one_by_one]
    for name in one_by_one[0]:
        expected = np.concatenate([row[name] for row in one_by_one])
        np.testing.assert_array_equal(rows[name], expected, name)
        assert rows[name].dtype == expected.dtype


def test_what_does_not_fit_is_refused():
    draws = SequenceDraws(LAYOUT, V, MaskingConfig())
    text = TokenSegment(TEXT, [1] * (MAX_TEXT + 1))
    with pytest.raises(ValueError, match="6 ids do not fit 5 tokens"):
        draws.draw_all(flatten([Example((text,))]), np.array([0]), generator)
    image = TokenSegment(IMAGE, [0] * NUM_CODES)
    with pytest.raises(ValueError, match="0 texts and 3 images does not fit 2 texts"):
        draws.draw_all(flatten([Example((image,) * 3)]), np.array([0]), generator)
    with pytest.raises(UserError, match="3 documents were given, but the model takes at most 2"):
        draws.draw_all(flatten([Example((image,))] * 4), np.array([3]), generator)
    few = SequenceDraws(LAYOUT, vocabulary.train_vocabulary([], 256, 32, 4), MaskingConfig())
    high = Example((TokenSegment(IMAGE, [40] * NUM_CODES),))
    with pytest.raises(ValueError, match="the id 40 is not in"):
        few.draw_all(flatten([high]), np.array([0]), generator)
