"""Sequences: slots and packed positions, targets, roles, and prompts that are beginnings of sequences."""

import dataclasses
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_mm.core import roles
from rag_mm.core.errors import UserError
from rag_mm.data import masking, sequences, vocabulary
from rag_mm.data.token_documents import IMAGE, TEXT, Example, TokenSegment, pair

VOCABULARY = vocabulary.train_vocabulary([], 256, 64, 8)
SIZED = vocabulary.train_vocabulary([], 256, 64, 8, image_sizes=(8, 4))
V = VOCABULARY
E, B, X = V.eod, V.brk, V.eoss
S0, S1 = V.sentinel(0), V.sentinel(1)
C = V.code_offset
LAYOUT = sequences.Layout(max_docs=2, max_text_len=3, num_codes=4, max_spans=2)  # slots of 9
MAIN = pair([11, 12], np.array([1, 2, 3, 4], np.int32))
DOC = pair([21], np.array([5, 6, 7, 8], np.int32))
EMPTY = pair([], np.array([9, 9, 9, 9], np.int32))
# Texts and images in any order: a story, an edit of an image, a question.
WIDE = dataclasses.replace(LAYOUT, max_docs=1, num_texts=2, num_images=3, max_spans=4)
SHAPES = {
    "story": (TEXT, IMAGE, IMAGE, TEXT, IMAGE),
    "edit": (IMAGE, TEXT, IMAGE),
    "question": (IMAGE, TEXT, TEXT),
    "image": (IMAGE,),
    "text": (TEXT,),
}


def make_segment(rng, kind, layout, **changes):
    if kind == TEXT:
        ids = rng.integers(0, V.text_size, rng.integers(0, layout.max_text_len + 1))
    else:
        ids = rng.integers(0, V.codebook_size, rng.integers(1, layout.num_codes))
    return TokenSegment(kind, ids.astype(np.int32), **changes)


def make_example(rng, layout, kinds=(TEXT, IMAGE)):
    return Example(tuple(make_segment(rng, kind, layout) for kind in kinds))


def real(row, name):
    return row[name][row["segment_ids"] == 1].tolist()


def segments_of(layout, main, docs=()):
    return sequences.lay_out(layout, VOCABULARY, main, docs).segments


def test_worked_example_of_masking_takes_no_loss_on_sentinels():
    """`E t1 t2 B i1 i2 i3 i4 E`, span i2..i3: loss 0 on both S0 targets and 1 elsewhere."""
    row = sequences.make_row(LAYOUT, VOCABULARY, MAIN, (), np.array([[5, 7]]))
    tokens = [E, 11, 12, B, C + 1, S0, C + 4, E, S0, C + 2, C + 3, X]
    assert real(row, "tokens") == tokens
    assert real(row, "targets") == [*tokens[1:], V.pad]
    #                             t1 t2 B i1 S0 i4 E S0 i2 i3 X, then padding
    assert real(row, "roles") == [1, 1, 1, 1, 3, 1, 1, 3, 1, 1, 1, 0]
    # The main slot is the third: 19 + (text 0..2, BRK 3, image 4..7, EOD 8). The codes keep 24 and 25.
    assert real(row, "positions") == [18, 19, 20, 22, 23, 24, 26, 27, 23, 24, 25, 26]


def test_documents_come_first_and_own_their_breaks():
    row = sequences.make_row(LAYOUT, VOCABULARY, MAIN, [DOC])
    doc, main = [21, B, C + 5, C + 6, C + 7, C + 8, B], [11, 12, B, C + 1, C + 2, C + 3, C + 4, E]
    assert real(row, "tokens") == [E, *doc, *main]
    assert real(row, "targets") == [*doc, *main, V.pad]
    assert real(row, "roles") == [roles.RETRIEVED] * 7 + [roles.MAIN] * 8 + [roles.IGNORED]
    doc_positions = [10, 13, 14, 15, 16, 17, 18]
    assert real(row, "positions") == [9, *doc_positions, 19, 20, *range(22, 28)]


def test_a_document_of_several_images_is_laid_out_in_its_order():
    """`E i B t B i E`, with an image that is context alone: no loss on it nor on the break after it."""
    given, edited = np.array([1, 2, 3, 4], np.int32), np.array([5, 6], np.int32)
    edit = Example(
        (
            TokenSegment(IMAGE, given, role=roles.IGNORED),
            TokenSegment(TEXT, [11]),
            TokenSegment(IMAGE, edited),
        )
    )
    row = sequences.make_row(WIDE, VOCABULARY, edit)
    tokens = [E, C + 1, C + 2, C + 3, C + 4, B, 11, B, C + 5, C + 6, E]
    assert real(row, "tokens") == tokens
    assert real(row, "roles") == [0] * 5 + [1] * 5 + [0]
    slot = WIDE.slot + 1
    expected = [
        slot - 1,
        *range(slot, slot + 5),
        slot + 5,
        slot + 8,
        slot + 9,
        slot + 10,
        slot + 13,
    ]
    assert real(row, "positions") == expected


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
    full = pair([1, 2, 3], np.arange(4, dtype=np.int32))
    segments = segments_of(LAYOUT, full, [full, full])
    row = sequences.make_row(LAYOUT, VOCABULARY, full, [full, full], segments[[1, 5]])
    assert row["segment_ids"].all()
    everything = sequences.Layout(2, 3, 4, max_spans=6)
    row = sequences.make_row(everything, VOCABULARY, full, [full, full], segments)
    assert row["positions"].max() == everything.num_positions - 1


def test_the_papers_sizes_fit_their_positions():
    """Two retrieved documents and the main one, of 1,024 codes and 77 tokens: RA-CM3 has 4,096 positions."""
    layout = sequences.Layout(max_docs=2, max_text_len=77, num_codes=1024, max_spans=3)
    main = pair(list(range(77)), np.zeros(1024, np.int32))
    plain = sequences.lay_out(layout, VOCABULARY, main, [main, main])
    masked = sequences.mask(layout, VOCABULARY, plain, plain.segments[[1, 3, 5]])
    assert masked.positions.max() < layout.num_positions <= len(plain.tokens) < 4096
    packed = dataclasses.replace(layout, kind="packed", max_seq_len=4096)
    masked = sequences.mask(packed, VOCABULARY, plain, plain.segments[[1, 3, 5]])
    assert masked.positions.tolist() == list(range(len(masked.tokens)))
    with pytest.raises(UserError, match="max_seq_len is 3000"):
        dataclasses.replace(packed, max_seq_len=3000)


def test_text_length_never_shifts_an_image():
    codes = {}
    for text in ([], [1], [1, 2, 3]):
        main = pair(text, MAIN.codes)
        for docs in ([], [EMPTY], [DOC, EMPTY]):
            row = sequences.make_row(LAYOUT, VOCABULARY, main, docs)
            start, end = segments_of(LAYOUT, main, docs)[-1]
            assert row["tokens"][start:end].tolist() == (MAIN.codes + C).tolist()
            codes[len(text), len(docs)] = row["positions"][start:end].tolist()
    assert set(map(tuple, codes.values())) == {(23, 24, 25, 26)}


@pytest.mark.parametrize("shape", SHAPES)
@given(seed=st.integers(0, 2**32 - 1), num_docs=st.integers(0, 1), is_sized=st.booleans())
def test_masking_changes_the_order_and_nothing_else(shape, seed, num_docs, is_sized):
    rng = np.random.default_rng(seed)
    vocab = SIZED if is_sized else VOCABULARY
    layout = dataclasses.replace(WIDE, num_codes=int(rng.integers(2, 9)))
    main, *docs = (make_example(rng, layout, SHAPES[shape]) for _ in range(num_docs + 1))
    plain = sequences.lay_out(layout, vocab, main, docs)
    masks = masking.Masking(1, 0.5)
    spans = masking.sample_spans(
        masks, plain.segments[plain.is_maskable], rng, layout.max_spans, len(plain.tokens)
    )
    masked = sequences.mask(layout, vocab, plain, spans)
    assert masking.unmask(masked.tokens, vocab).tolist() == plain.tokens.tolist()

    row = sequences.as_row(vocab, masked, layout.length)
    n = len(masked.tokens)
    targets, row_roles = row["targets"][: n - 1], row["roles"][: n - 1]
    assert targets.tolist() == masked.tokens[1:].tolist()
    is_sentinel = (targets >= vocab.sentinel(0)) & (targets <= vocab.sentinel(7))
    assert (row_roles[is_sentinel] == roles.SENTINEL).all()
    assert np.isin(row_roles[~is_sentinel], (roles.MAIN, roles.RETRIEVED)).all()
    # Every token keeps the role and the position of its document, wherever it went.
    kept = ~is_sentinel & (targets != vocab.eoss)
    places = row["positions"][1:n]
    assert sorted(
        zip(targets[kept].tolist(), row_roles[kept].tolist(), places[kept].tolist(), strict=True)
    ) == sorted(
        zip(
            plain.tokens[1:].tolist(),
            plain.roles[1:].tolist(),
            plain.positions[1:].tolist(),
            strict=True,
        )
    )
    assert 0 <= masked.positions.min() <= masked.positions.max() < layout.num_positions


@given(seed=st.integers(0, 2**32 - 1))
def test_a_segment_that_may_not_be_masked_stays(seed):
    rng = np.random.default_rng(seed)
    fixed = make_segment(rng, IMAGE, WIDE, is_maskable=False)
    context = make_segment(rng, IMAGE, WIDE, role=roles.IGNORED)
    main = Example((fixed, make_segment(rng, TEXT, WIDE), context))
    plain = sequences.lay_out(WIDE, VOCABULARY, main)
    assert plain.is_maskable.tolist() == [False, True, False]
    spans = (
        masking.sample_spans(
            masking.Masking(1), plain.segments[plain.is_maskable], rng, 4, len(plain.tokens)
        )
        if len(main.text)
        else np.zeros((0, 2), np.int32)
    )
    masked = sequences.mask(WIDE, VOCABULARY, plain, spans)
    end = plain.segments[0, 1]
    assert masked.tokens[:end].tolist() == plain.tokens[:end].tolist()
    with pytest.raises(ValueError, match="not inside"):
        sequences.mask(WIDE, VOCABULARY, plain, plain.segments[:1])
    with pytest.raises(ValueError, match="not inside"):
        sequences.mask(WIDE, VOCABULARY, plain, plain.segments[2:])


@given(seed=st.integers(0, 2**32 - 1))
def test_packed_differs_from_slots_in_positions_alone(seed):
    rng = np.random.default_rng(seed)
    main, *docs = (make_example(rng, LAYOUT) for _ in range(rng.integers(1, 4)))
    packed = dataclasses.replace(LAYOUT, kind="packed", max_seq_len=LAYOUT.length)
    plain = sequences.lay_out(LAYOUT, VOCABULARY, main, docs)
    spans = masking.sample_spans(masking.Masking(1, 0.5), plain.segments, rng, 2)
    one, other = (sequences.make_row(at, V, main, docs, spans) for at in (LAYOUT, packed))
    for name in ("tokens", "targets", "roles", "segment_ids"):
        np.testing.assert_array_equal(one[name], other[name])
    assert real(other, "positions") == list(range(len(real(other, "tokens"))))


def test_positions_are_equal_where_texts_fill_their_room():
    full = pair([1, 2, 3], np.arange(4, dtype=np.int32))
    packed = dataclasses.replace(LAYOUT, kind="packed", max_seq_len=LAYOUT.length)
    one, other = (sequences.make_row(at, V, full, [full, full]) for at in (LAYOUT, packed))
    np.testing.assert_array_equal(one["positions"], other["positions"])


def assert_begins(prompt, row):
    """The prompt is an exact prefix of the row, and the next position is the row's next."""
    n = len(prompt.tokens)
    assert prompt.tokens.dtype == prompt.positions.dtype == np.int32
    assert prompt.tokens.tolist() == row["tokens"][:n].tolist()
    assert prompt.positions.tolist() == row["positions"][:n].tolist()
    assert prompt.next_position == row["positions"][n]
    assert row["segment_ids"][n] == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["slots", "packed"])
def test_prompts_are_beginnings_of_training_sequences(shape, kind):
    rng = np.random.default_rng(0)
    layout = dataclasses.replace(WIDE, kind=kind, max_seq_len=WIDE.length)
    full = dataclasses.replace(layout, max_text_len=3)
    for vocab in (VOCABULARY, SIZED):
        kinds = SHAPES[shape]
        main, doc = (make_example(rng, full, kinds) for _ in range(2))
        main = Example(
            tuple(s if len(s.ids) else dataclasses.replace(s, ids=[7]) for s in main.segments)
        )
        plain = sequences.lay_out(layout, vocab, main, [doc])
        for number, (start, end) in enumerate(plain.main):
            prompt = sequences.continue_prompt(layout, vocab, main, number, [doc])
            row = sequences.as_row(vocab, plain)
            n = len(prompt.tokens)
            assert prompt.tokens.tolist() == row["tokens"][:n].tolist() and n == start
            assert prompt.next_position == row["positions"][n]
            earlier = list(range(number))
            prompt = sequences.continue_prompt(layout, vocab, main, number, [doc], earlier)
            masked = sequences.mask(layout, vocab, plain, plain.main[:number])
            assert_begins(prompt, sequences.as_row(vocab, masked))
            assert masked.tokens[len(prompt.tokens)] == plain.tokens[start]
            prompt = sequences.fill_prompt(layout, vocab, main, number, [doc])
            masked = sequences.mask(layout, vocab, plain, np.array([[start, end]]))
            assert_begins(prompt, sequences.as_row(vocab, masked))
            n = len(prompt.tokens)
            assert masked.tokens[n:].tolist() == [*plain.tokens[start:end].tolist(), X]


def test_a_main_document_begins_in_its_own_slot():
    """The retrieved one leaves room in its slot: a prompt for the first segment skips it."""
    for first in (MAIN, pair([], MAIN.codes)):
        prompt = sequences.continue_prompt(WIDE, VOCABULARY, first, 0, [DOC])
        row = sequences.make_row(WIDE, VOCABULARY, MAIN, [DOC])
        assert_begins(prompt, row)
        assert prompt.next_position == 1 + WIDE.slot


def test_the_room_that_a_short_text_leaves_is_not_counted_by_what_follows():
    prompt = sequences.continue_prompt(LAYOUT, VOCABULARY, MAIN, 1, [DOC])
    assert_begins(prompt, sequences.make_row(LAYOUT, VOCABULARY, MAIN, [DOC]))
    prompt = sequences.continue_prompt(LAYOUT, VOCABULARY, MAIN, 1, [DOC], masked=[0])
    assert prompt.tokens.tolist() == [E, 21, B, C + 5, C + 6, C + 7, C + 8, B, S0, B]
    prompt = sequences.fill_prompt(LAYOUT, VOCABULARY, MAIN, 0)
    assert prompt.tokens.tolist() == [E, S0, B, C + 1, C + 2, C + 3, C + 4, E, S0]


def test_holes_are_filled_one_after_the_other():
    holes = [(0, 1), (2, 4)]
    start = segments_of(LAYOUT, MAIN)[-1, 0]
    row = sequences.make_row(LAYOUT, VOCABULARY, MAIN, (), start + np.array(holes))
    first = sequences.fill_prompt(LAYOUT, VOCABULARY, MAIN, 1, (), holes)
    assert first.tokens.tolist() == [E, 11, 12, B, S0, C + 2, S1, E, S0]
    assert_begins(first, row)
    second = sequences.fill_prompt(LAYOUT, VOCABULARY, MAIN, 1, (), holes, num_filled=1)
    assert second.tokens[len(first.tokens) :].tolist() == [C + 1, X, S1]
    assert_begins(second, row)


def test_the_size_of_an_image_stands_before_its_codes():
    small = pair([11], np.array([1, 2], np.int32), image_size=4)
    layout = dataclasses.replace(LAYOUT, num_codes=5)
    offset = SIZED.code_offset
    for main, token in ((small, SIZED.size_token(4)), (MAIN, SIZED.size_token(8))):
        prompt = sequences.continue_prompt(layout, SIZED, main, 1)
        assert prompt.tokens[-2:].tolist() == [B, token]
        row = sequences.make_row(layout, SIZED, main)
        at = len(prompt.tokens)
        assert (row["tokens"][at : at + len(main.codes)] - offset).tolist() == main.codes.tolist()
    # A masked image leaves its size in place.
    prompt = sequences.fill_prompt(layout, SIZED, small, 1)
    assert prompt.tokens.tolist() == [E, 11, B, SIZED.size_token(4), S0, E, S0]
    with pytest.raises(UserError, match="16 is none"):
        sequences.make_row(layout, SIZED, pair([1], [1], image_size=16))


def test_stacked_prompts_are_padded_on_the_left():
    short, long = (
        sequences.continue_prompt(LAYOUT, VOCABULARY, pair(text, MAIN.codes), 1)
        for text in ([11], [11, 12])
    )
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
    with pytest.raises(ValueError, match="max_text_len is 0"):
        sequences.Layout(max_text_len=0)
    bad_examples = {
        r"\(4,\) do not fit 3": pair([1] * 4, MAIN.codes),
        r"not in \[0, 256\)": pair([V.eoss], MAIN.codes),
        r"\(5,\) do not fit 4": pair([1], np.zeros(5, np.int32)),
        r"not in \[0, 64\)": pair([1], MAIN.codes + V.codebook_size),
        "does not fit 1 texts": Example((TokenSegment(TEXT, [1]), TokenSegment(TEXT, [1]))),
        "does not fit": Example(()),
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
    with pytest.raises(ValueError, match="not ranges inside"):
        sequences.fill_prompt(LAYOUT, VOCABULARY, MAIN, 1, (), [(2, 5)])
    with pytest.raises(ValueError, match="does not fit"):
        sequences.as_row(V, sequences.lay_out(LAYOUT, V, MAIN), 3)


def test_the_worked_example_of_the_page_is_what_the_code_makes():
    page = pathlib.Path(__file__).parents[2] / "docs" / "sequences.md"
    table = page.read_text().split("<!-- worked example -->")[1].split("\n\n")[1]
    rows = {
        name.strip(): [cell.strip() for cell in cells]
        for name, *cells in (line.strip("|").split("|") for line in table.splitlines())
    }
    vocab = vocabulary.train_vocabulary([], 256, 16, 4)
    plain = sequences.lay_out(LAYOUT, vocab, MAIN, [DOC])
    spans = plain.main[1, 0] + np.array([[1, 3]])
    packed = dataclasses.replace(LAYOUT, kind="packed", max_seq_len=LAYOUT.length)
    made, other = (
        sequences.as_row(vocab, sequences.mask(layout, vocab, plain, spans))
        for layout in (LAYOUT, packed)
    )
    for name, values in (
        ("token", made["tokens"]),
        ("position, slots", made["positions"]),
        ("position, packed", other["positions"]),
        ("role of the next token", made["roles"]),
    ):
        assert rows[name] == [str(value) for value in values]
    words = {vocab.eod: "EOD", vocab.brk: "BRK", vocab.eoss: "EOSS", vocab.sentinel(0): "S0"}
    codes = {vocab.code_offset + code: f"code {code}" for code in range(16)}
    assert rows["meaning"] == [(words | codes).get(t, "text") for t in made["tokens"].tolist()]
