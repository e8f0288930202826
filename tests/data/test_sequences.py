"""What a row is: slots, targets, roles, and prompts that are the beginnings of training rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_mm.core import roles
from rag_mm.core.errors import UserError
from rag_mm.data import masking, sequences, vocabulary

VOCABULARY = vocabulary.train_vocabulary([], 256, 64, 8)
V = VOCABULARY
E, B, X = V.eod, V.brk, V.eoss
S0, S1 = V.sentinel(0), V.sentinel(1)
C = V.code_offset
LAYOUT = sequences.Layout(max_docs=2, max_text_len=3, num_codes=4, max_spans=2)  # slots of 9
MAIN = sequences.Example([11, 12], np.array([1, 2, 3, 4], np.int32))
DOC = sequences.Example([21], np.array([5, 6, 7, 8], np.int32))
EMPTY = sequences.Example([], np.array([9, 9, 9, 9], np.int32))


def make_example(rng, layout):
    text = rng.integers(0, V.text_size, rng.integers(0, layout.max_text_len + 1)).tolist()
    return sequences.Example(
        text, rng.integers(0, V.codebook_size, layout.num_codes).astype(np.int32)
    )


def real(row, name):
    return row[name][row["segment_ids"] == 1].tolist()


def test_worked_example_of_masking_takes_no_loss_on_sentinels():
    """`E t1 t2 B i1 i2 i3 i4 E`, span i2..i3: loss 0 on both S0 targets and 1 elsewhere."""
    row = sequences.make_row(LAYOUT, VOCABULARY, MAIN, (), np.array([[5, 7]]))
    tokens = [E, 11, 12, B, C + 1, S0, C + 4, E, S0, C + 2, C + 3, X]
    assert real(row, "tokens") == tokens
    assert real(row, "targets") == [*tokens[1:], V.pad]
    #                             t1 t2 B i1 S0 i4 E S0 i2 i3 X, then padding
    assert real(row, "roles") == [1, 1, 1, 1, 3, 1, 1, 3, 1, 1, 1, 0]
    # The main slot is the third: 19 + (text 0..2, BRK 3, image 4..7, EOD 8); moved from 28 on.
    moved = [28, 29, 30, 31]
    assert real(row, "positions") == [18, 19, 20, 22, 23, 24, 26, 27, *moved]


def test_documents_come_first_and_own_their_breaks():
    row = sequences.make_row(LAYOUT, VOCABULARY, MAIN, [DOC])
    doc, main = [21, B, C + 5, C + 6, C + 7, C + 8, B], [11, 12, B, C + 1, C + 2, C + 3, C + 4, E]
    assert real(row, "tokens") == [E, *doc, *main]
    assert real(row, "targets") == [*doc, *main, V.pad]
    assert real(row, "roles") == [roles.RETRIEVED] * 7 + [roles.MAIN] * 8 + [roles.IGNORED]
    doc_positions = [10, 13, 14, 15, 16, 17, 18]
    assert real(row, "positions") == [9, *doc_positions, 19, 20, *range(22, 28)]


def test_rows_are_padded_at_the_end():
    row = sequences.make_row(LAYOUT, VOCABULARY, MAIN)
    assert {name: value.dtype for name, value in row.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "positions": np.int32,
        "segment_ids": np.int32,
        "roles": np.int8,
    }
    assert all(value.shape == (LAYOUT.length,) for value in row.values())
    assert row["segment_ids"].tolist() == [1] * 9 + [0] * (LAYOUT.length - 9)
    assert (row["tokens"][9:] == V.pad).all()
    assert (row["roles"][8:] == roles.IGNORED).all()


def test_a_moved_span_keeps_the_role_of_its_document():
    spans = np.array([[3, 5], [8, 10]])  # Two codes of the document, the main text.
    row = sequences.make_row(LAYOUT, VOCABULARY, MAIN, [DOC], spans)
    tokens, roles = real(row, "targets"), real(row, "roles")
    assert tokens[-9:] == [S0, C + 5, C + 6, X, S1, 11, 12, X, V.pad]
    assert roles[-9:] == [3, 2, 2, 2, 3, 1, 1, 1, 0]


def test_the_fullest_row_fills_the_layout_exactly():
    full = sequences.Example([1, 2, 3], np.arange(4, dtype=np.int32))
    segments = sequences.find_segments(LAYOUT, full, [full, full])
    row = sequences.make_row(LAYOUT, VOCABULARY, full, [full, full], segments[[1, 5]])
    assert row["segment_ids"].all()
    everything = sequences.Layout(2, 3, 4, max_spans=6)
    row = sequences.make_row(everything, VOCABULARY, full, [full, full], segments)
    assert row["positions"].max() == everything.num_positions - 1


def test_text_length_never_shifts_an_image():
    codes = {}
    for text in ([], [1], [1, 2, 3]):
        main = sequences.Example(text, MAIN.codes)
        for docs in ([], [EMPTY], [DOC, EMPTY]):
            row = sequences.make_row(LAYOUT, VOCABULARY, main, docs)
            start, end = sequences.find_segments(LAYOUT, main, docs)[-1]
            assert row["tokens"][start:end].tolist() == (MAIN.codes + C).tolist()
            codes[len(text), len(docs)] = row["positions"][start:end].tolist()
    assert set(map(tuple, codes.values())) == {(23, 24, 25, 26)}


@given(seed=st.integers(0, 2**32 - 1), num_docs=st.integers(0, 2))
def test_masking_changes_the_order_and_nothing_else(seed, num_docs):
    rng = np.random.default_rng(seed)
    layout = sequences.Layout(2, int(rng.integers(1, 6)), int(rng.integers(1, 9)), 4)
    main, *docs = (make_example(rng, layout) for _ in range(num_docs + 1))
    segments = sequences.find_segments(layout, main, docs)
    spans = masking.sample_spans(masking.Masking(1, 0.5), segments, rng, layout.max_spans)
    plain = sequences.make_row(layout, VOCABULARY, main, docs)
    masked = sequences.make_row(layout, VOCABULARY, main, docs, spans)

    tokens = real(masked, "tokens")
    assert masking.unmask(tokens, VOCABULARY).tolist() == real(plain, "tokens")
    targets, row_roles = masked["targets"][: len(tokens) - 1], masked["roles"][: len(tokens) - 1]
    assert targets.tolist() == tokens[1:]
    is_sentinel = (targets >= S0) & (targets < S0 + V.num_sentinels)
    assert (row_roles[is_sentinel] == roles.SENTINEL).all()
    assert np.isin(row_roles[~is_sentinel], (roles.MAIN, roles.RETRIEVED)).all()
    # Every token keeps the role of its document, wherever it went.
    kept = ~is_sentinel & (targets != X)
    n = len(real(plain, "tokens")) - 1
    assert sorted(zip(targets[kept].tolist(), row_roles[kept].tolist(), strict=True)) == sorted(
        zip(plain["targets"][:n].tolist(), plain["roles"][:n].tolist(), strict=True)
    )
    positions = masked["positions"][masked["segment_ids"] == 1]
    assert (np.diff(positions) > 0).all() and positions[-1] < layout.num_positions


def test_captions_too_long_are_cut_and_counted():
    example = sequences.make_example(LAYOUT, VOCABULARY, "abcde", MAIN.codes)
    assert VOCABULARY.decode_text(example.text) == "abc"
    assert example.num_cut == 2
    assert sequences.make_example(LAYOUT, VOCABULARY, "abc", MAIN.codes).num_cut == 0
    assert sequences.make_example(LAYOUT, VOCABULARY, "", MAIN.codes).text == []


def assert_begins(prompt, row):
    """The prompt is an exact prefix of the row, and the next position is the row's next."""
    n = len(prompt.tokens)
    assert prompt.tokens.dtype == prompt.positions.dtype == np.int32
    assert prompt.tokens.tolist() == row["tokens"][:n].tolist()
    assert prompt.positions.tolist() == row["positions"][:n].tolist()
    assert prompt.next_position == row["positions"][n]
    assert row["segment_ids"][n] == 1


@pytest.mark.parametrize("docs", [(), (DOC,), (DOC, EMPTY)])
@pytest.mark.parametrize("text", [[11], [11, 12, 13]])
def test_prompts_are_beginnings_of_training_rows(docs, text):
    main = sequences.Example(text, MAIN.codes)
    segments = sequences.find_segments(LAYOUT, main, docs)

    prompt = sequences.caption_to_image_prompt(LAYOUT, VOCABULARY, text, docs)
    assert_begins(prompt, sequences.make_row(LAYOUT, VOCABULARY, main, docs))
    last_code = segments[-1, 1] + np.array([[-1, 0]])
    assert_begins(prompt, sequences.make_row(LAYOUT, VOCABULARY, main, docs, last_code))

    prompt = sequences.image_to_caption_prompt(LAYOUT, VOCABULARY, main.codes, docs)
    assert prompt.tokens[-8:].tolist() == [S0, B, C + 1, C + 2, C + 3, C + 4, E, S0]
    row = sequences.make_row(LAYOUT, VOCABULARY, main, docs, segments[-2:-1])
    assert_begins(prompt, row)
    n = len(prompt.tokens)
    assert row["tokens"][n : n + len(text) + 1].tolist() == [*text, X]

    prompt = sequences.infill_prompt(LAYOUT, VOCABULARY, main, 1, 3, docs)
    assert prompt.tokens[-6:].tolist() == [B, C + 1, S0, C + 4, E, S0]
    hole = segments[-1, 0] + np.array([[1, 3]])
    assert_begins(prompt, sequences.make_row(LAYOUT, VOCABULARY, main, docs, hole))


def test_stacked_prompts_are_padded_on_the_left():
    short = sequences.caption_to_image_prompt(LAYOUT, VOCABULARY, [11])
    long = sequences.caption_to_image_prompt(LAYOUT, VOCABULARY, [11, 12])
    tokens, positions, segment_ids = sequences.stack_prompts([short, long], 5)
    assert tokens.tolist() == [[0, 0, E, 11, B], [0, E, 11, 12, B]]
    assert positions.tolist() == [[0, 0, 18, 19, 22], [0, 18, 19, 20, 22]]
    assert segment_ids.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert tokens.dtype == positions.dtype == segment_ids.dtype == np.int32
    with pytest.raises(ValueError, match="longer than 3"):
        sequences.stack_prompts([short, long], 3)


def test_mistakes_are_named():
    make = sequences.make_row
    with pytest.raises(UserError, match="at most 2"):
        make(LAYOUT, VOCABULARY, MAIN, [DOC] * 3)
    with pytest.raises(UserError, match="max_text_len is 0"):
        sequences.Layout(max_text_len=0)
    bad_examples = {
        "longer than 3": sequences.Example([1] * 4, MAIN.codes),
        "not below": sequences.Example([V.eoss], MAIN.codes),
        "shape": sequences.Example([1], MAIN.codes[:3]),
        "codebook": sequences.Example([1], MAIN.codes + V.codebook_size),
    }
    for message, example in bad_examples.items():
        with pytest.raises(ValueError, match=message):
            make(LAYOUT, VOCABULARY, example)
    for message, spans in {
        "not inside": [[2, 5]],  # Over a break.
        "disjoint": [[4, 6], [5, 7]],
        "room for 2": [[1, 2], [4, 5], [6, 7]],
    }.items():
        with pytest.raises(ValueError, match=message):
            make(LAYOUT, VOCABULARY, MAIN, (), np.array(spans))
    with pytest.raises(ValueError, match="not a range inside"):
        sequences.infill_prompt(LAYOUT, VOCABULARY, MAIN, 2, 5)
