"""Training rows: every sequence whole with its pictures, retrieved documents first, roles and mixture."""

import dataclasses
import functools

import numpy as np
import pytest

from rag_mm.core import image_slots
from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.core.roles import IGNORED, MAIN, RETRIEVED
from rag_mm.data import packing
from rag_mm.data.interleaved import Mark
from rag_mm.stages.emu import album, row_maker, training_rows
from rag_mm.stages.emu.training_documents import TrainingDocuments
from rag_mm.stages.emu.training_rows import InterleavedConfig, MixtureConfig

IDS, N = SlotTokens(100, 101, 102, 103, 104, 105), 2
# A text is its letters; picture i has the vector (i, i, i).
MAKER = row_maker.RowMaker(lambda text: [ord(each) - 97 for each in text], IDS, N, 5)
PICTURES = album.PictureArrays((np.arange(40, dtype=np.float16)[:, None] * np.ones((1, 3)),))
DOCUMENTS = TrainingDocuments(
    album.Album(),
    pairs=[("abc", 0), ("de", 1), ("f", 2)],
    memory=[("ghi", 10), ("j", 11), ("k", 12)],
    stories=[("a", 3, "b", 4)],
    clips=[("cd", *range(20, 28))],
    documents=[tuple("abcdefgh"), (30, "a", 31, "b", 32, "c")],
)
# Of pair 0 memory row 0 by its caption and row 1 by its image, and so on.
NEIGHBORS = np.array([[[0], [1]], [[1], [2]], [[2], [0]]], np.int32)


def test_the_targets_of_a_dialogue_are_its_answers_and_what_ends_each():
    marks = {Mark.USER: (106, 9), Mark.ASSISTANT: (107, 9), Mark.END: (IDS.end,)}
    maker = dataclasses.replace(MAKER, marks=marks)
    parts = (Mark.USER, 3, "a", Mark.ASSISTANT, "bc", Mark.END, Mark.USER, "d", Mark.ASSISTANT, "e")
    row = maker.dialogue((*parts, Mark.END))
    tokens, targets = row["tokens"].tolist(), row["targets"].tolist()
    said = [100, 106, 9, *image(), 0, 107, 9, 1, 2, 101, 106, 9, 3, 107, 9, 4, 101]
    assert tokens == said and targets == [*said[1:], IDS.pad]
    counted = [target for target, role in zip(targets, row["roles"], strict=True) if role == MAIN]
    assert counted == [1, 2, 101, 4, 101] and set(row["roles"]) == {MAIN, IGNORED}
    for name, values in maker.dialogue(parts).items():
        np.testing.assert_array_equal(values, row[name])
    with pytest.raises(UserError, match="was not tuned on instructions"):
        MAKER.prompt(parts)


def source(mixture=None, **changes):
    defaults = dict(num_docs_weights=(1.0,), max_seq_len=64, max_images=8)
    config = InterleavedConfig(mixture=mixture or MixtureConfig(), **defaults | changes)
    return training_rows.RowSource(config, DOCUMENTS, NEIGHBORS, MAKER, PICTURES, "image_tokens")


def image():
    return [IDS.image, IDS.slot, IDS.slot, IDS.end_image]


def test_a_row_has_the_documents_first_and_says_which_targets_are_theirs():
    row = MAKER.row(("ab", 7), (8, "c"))
    assert row["tokens"].tolist() == [100, 0, 1, *image(), *image(), 2, 101]
    assert row["targets"].tolist() == [*row["tokens"].tolist()[1:], IDS.pad]
    # Of each target: 6 tokens are the document's, then image, text and end, and nothing after it.
    assert row["roles"].tolist() == [RETRIEVED] * 6 + [MAIN] * 6 + [IGNORED]
    assert row["pictures"].tolist() == [7, 8]
    np.testing.assert_array_equal(row["positions"], np.arange(13))


def test_texts_are_cut_and_lengths_are_known():
    assert MAKER.text("abcdefgh") == [0, 1, 2, 3, 4]
    parts = ("abcdefgh", 3, "a")
    assert MAKER.length(parts) == len(MAKER.row((), parts)["tokens"]) == 2 + 5 + 4 + 1
    prompt = MAKER.prompt(parts, starts_image=True)
    assert prompt.tokens.tolist() == [100, 0, 1, 2, 3, 4, *image(), 0, 103]
    assert prompt.slot.max() == N - 1


@pytest.fixture
def small_windows(monkeypatch):
    """Few sequences are made before the first batch."""
    small = functools.partial(packing.make_packed_batches, window=32)
    monkeypatch.setattr(packing, "make_packed_batches", small)


def drawn(made, count=60):
    rng = np.random.default_rng(0)
    return [made.make(np.int64(i), rng) for i in range(count)]


def test_pairs_come_in_both_orders_after_one_of_their_neighbors():
    made = source(num_docs_weights=(0.5, 0.5))
    found = {tuple(row["tokens"].tolist()) for row in drawn(made, 300)}
    main = {
        0: [[100, 0, 1, 2, *image(), 101], [100, *image(), 0, 1, 2, 101]],
        2: [[100, 5, *image(), 101], [100, *image(), 5, 101]],
    }
    for whole in main.values():
        assert {tuple(each) for each in whole} <= found
    # With a document, in the same order as the pair: row 0 by the caption, row 1 by the image.
    by_caption = (100, 6, 7, 8, *image(), 0, 1, 2, *image(), 101)
    by_image = (100, *image(), 9, *image(), 0, 1, 2, 101)
    assert {by_caption, by_image} <= found
    # Three pairs in two orders, without a document or with that of what comes first.
    assert len(found) == 3 * 2 * 2
    # A config may draw what is searched with.
    drawn_query = source(num_docs_weights=(0.5, 0.5), image_query_prob=0.5)
    found = {tuple(row["tokens"].tolist()) for row in drawn(drawn_query, 300)}
    assert (100, 9, *image(), 0, 1, 2, *image(), 101) in found and len(found) == 3 * 2 * 3


def test_kinds_are_drawn_by_their_shares():
    shares = MixtureConfig(pairs=1, stories=1, clips=2, texts=4)
    rows = drawn(source(shares), 800)
    images = np.bincount([len(row["pictures"]) for row in rows], minlength=9) / 800
    assert images[[1, 2, 8, 0]] == pytest.approx([1 / 8, 1 / 8, 2 / 8, 4 / 8], abs=0.05)


def test_windows_of_documents_fit_a_row():
    made = source(MixtureConfig(0, documents=1), max_seq_len=12, max_images=1)
    for row in drawn(made):
        assert len(row["tokens"]) <= 12 and len(row["pictures"]) <= 1
    assert any(len(row["pictures"]) for row in drawn(made))


def test_no_token_of_a_long_document_is_lost():
    """Texts are cut to 5 tokens elsewhere; here one of 23 stands between two images."""
    text = "abcdefghijklmnopqrstuvw"
    documents = dataclasses.replace(DOCUMENTS, documents=[(30, text, 31)])
    mixture = MixtureConfig(0, documents=1)
    config = InterleavedConfig(mixture, (1.0,), max_text_len=5, max_seq_len=14)
    made = training_rows.RowSource(config, documents, None, MAKER, PICTURES, "image_tokens")
    rows = [[t for t in row["tokens"].tolist() if t < 100] for row in drawn(made, 100)]
    assert {token for row in rows for token in row} == set(range(23))
    # Successive tokens, and as many as fit.
    assert all(np.diff(row).tolist() == [1] * (len(row) - 1) for row in rows)
    assert max(map(len, rows)) == 10


@pytest.mark.parametrize("num_slots", [1, 4])
def test_images_of_another_number_of_slots_leave_a_step_its_sequences(small_windows, num_slots):
    mixture = MixtureConfig(pairs=2, stories=1, texts=1, documents=1)
    changes = dict(mixture=mixture, num_docs_weights=(0.5, 0.5), max_seq_len=20, max_images=4)
    plain, counted = source(**changes), source(**changes, counted_slots=N)
    other = dataclasses.replace(counted, maker=dataclasses.replace(MAKER, num_slots=num_slots))
    more = max(0, num_slots - N) * 4
    batches = zip(plain.batches(8, 3), other.batches(8, 3), range(4), strict=False)
    for ours, theirs, _ in batches:
        assert theirs["tokens"].shape == (8, 20 + more)
        np.testing.assert_array_equal(ours["image_tokens"], theirs["image_tokens"])
        for name in ("tokens", "segment_ids", "roles", "records"):
            left, right = (
                [row[(tokens != IDS.slot) & (segments > 0)].tolist() for row, tokens, segments in
                 zip(batch[name], batch["tokens"], batch["segment_ids"], strict=True)]
                for batch in (ours, theirs)
            )  # fmt: skip
            assert left == right
        assert (theirs["slot"].max(1) + 1 == (ours["slot"].max(1) + 1) // N * num_slots).all()


def test_packed_batches_number_the_slots_of_a_row_and_hold_their_pictures(small_windows):
    mixture = MixtureConfig(pairs=1, stories=1, texts=1)
    made = source(mixture, num_docs_weights=(0.5, 0.5), max_seq_len=40)
    batch = next(made.batches(4, 0))
    assert batch["image_tokens"].shape == (4, 8, 3)
    for i in range(4):
        num_images = int(batch["slot"][i].max() + 1) // N
        image_slots.check(batch["tokens"][i], batch["slot"][i], num_images, IDS, N)
        assert (batch["image_tokens"][i, num_images:] == 0).all()
        # Every sequence is one that a pair, a story or a text can give, with its own pictures.
        at = np.flatnonzero(batch["tokens"][i] == IDS.image)
        assert len(at) == num_images
        for sequence in range(1, batch["segment_ids"][i].max() + 1):
            inside = batch["segment_ids"][i] == sequence
            tokens = batch["tokens"][i][inside].tolist()
            assert tokens[0] == IDS.begin and tokens[-1] == IDS.end
            numbers = batch["slot"][i][inside]
            own = batch["image_tokens"][i][np.unique(numbers[numbers >= 0]) // N][::N, 0].tolist()
            text = [token for token in tokens if token < 100]
            assert (text[-1:], own[-1:]) in (
                ([2], [0]), ([4], [1]), ([5], [2]), ([1], [4]), ([2], []), ([4], []), ([5], []),
            )  # fmt: skip


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(UserError, match=r"clips does not fit a row: it has 36 tokens and 8 images"):
        drawn(source(MixtureConfig(0, clips=1), max_images=7))
    bare = dataclasses.replace(DOCUMENTS, stories=[])
    config = InterleavedConfig(mixture=MixtureConfig(stories=1.0), num_docs_weights=(1.0,))
    with pytest.raises(UserError, match="asks for stories, of which there are none"):
        training_rows.RowSource(config, bare, None, MAKER, PICTURES, "image_tokens")
    with pytest.raises(ValueError, match="all 0"):
        MixtureConfig(pairs=0)
