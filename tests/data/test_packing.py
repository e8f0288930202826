"""Packed rows hold every sequence whole, once, and little padding."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_mm.core.errors import UserError
from rag_mm.data import masking, packing, sequences, vocabulary
from rag_mm.data.token_documents import pair
from rag_mm.worlds.emoji import emoji_scenes

PADDING = {"tokens": 99}


def make(index, rng):
    """A sequence that says its record, of 3 to 9 tokens by the record's number."""
    size = 3 + int(index) % 7
    tokens = np.full(size, index, np.int32)
    tokens[-1] = rng.integers(1000, 2000)
    return {"tokens": tokens, "segment_ids": np.ones(size, np.int32)}


def batches(**changes):
    arguments = dict(batch_size=4, seed=0, transform=make, length=16, padding=PADDING, window=24)
    return packing.make_packed_batches(range(60), **arguments | changes)


def records_in(row):
    """The record of each sequence of a row, which must be whole."""
    found = []
    for number in range(1, row["segment_ids"].max() + 1):
        tokens = row["tokens"][row["segment_ids"] == number]
        assert len(tokens) == 3 + tokens[0] % 7 and (tokens[:-1] == tokens[0]).all()
        found.append(int(tokens[0]))
    return found


def rows_of(found):
    return [
        {k: v[i] for k, v in batch.items()} for batch in found for i in range(len(batch["tokens"]))
    ]


def test_every_record_is_in_an_epoch_once_and_whole():
    counts = collections.Counter()
    for row in rows_of(itertools.islice(batches(), 60)):
        counts.update(records_in(row))
        is_padding = row["segment_ids"] == 0
        np.testing.assert_array_equal(row["records"] < 0, is_padding)
        assert (row["records"] == np.where(row["tokens"] < 60, row["tokens"], row["records"]))[
            ~is_padding
        ].all()
        assert (row["tokens"][is_padding] == 99).all()
        assert (np.diff(np.flatnonzero(~is_padding)) == 1).all()
    # Only the windows at the end are cut off in the middle.
    assert set(counts) == set(range(60))
    assert max(counts.values()) - min(counts.values()) <= 2


def test_batches_depend_on_the_seed_alone_and_resume():
    one, other = batches(), batches()
    first = [next(one) for _ in range(5)]
    state = json.loads(json.dumps(one.get_state()))
    rest = [next(one) for _ in range(5)]
    for batch in first:
        np.testing.assert_equal(next(other), batch)
    resumed = batches()
    resumed.set_state(state)
    for batch in rest:
        np.testing.assert_equal(next(resumed), batch)
    assert not np.array_equal(next(batches(seed=1))["tokens"], first[0]["tokens"])


def test_processes_take_their_rows_of_one_stream_and_resume_at_one_place():
    whole, parts = batches(), [batches(rows=rows) for rows in (range(2), range(2, 4))]
    for step in range(12):
        expected, found = next(whole), [next(part) for part in parts]
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([f[name] for f in found]), values)
        if step == 5:
            state = parts[0].get_state()
            assert state == parts[1].get_state() == whole.get_state()
            later = batches(rows=range(2, 4))
            later.set_state(json.loads(json.dumps(state)))
        elif step > 5:
            np.testing.assert_equal(next(later), found[1])


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    length=st.integers(12, 40),
)
def test_no_two_rows_could_be_one(sizes, length):
    examples = [{"segment_ids": np.ones(size, np.int32)} for size in sizes]
    rows = packing.pack(examples, length, {})
    used = sorted(int((row["segment_ids"] > 0).sum()) for row in rows)
    assert sum(used) == sum(sizes) and used[0] > 0
    assert len(used) == 1 or used[0] + used[1] > length


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="longer than a row of 4"):
        packing.pack([{"segment_ids": np.ones(5, np.int32)}], 4, {})
    with pytest.raises(UserError, match="no records"):
        packing.make_packed_batches([], 4, 0, make, 16, padding={})


@pytest.mark.parametrize(("num_codes", "max_seq_len"), [(64, 1024), (256, 4096)])
def test_rows_of_real_captions_are_97_percent_full(num_codes, max_seq_len):
    """Scenes' captions with 0 to 2 documents before them, and masked spans."""
    world = emoji_scenes.Scenes(("easy", "pairs", "sizes"), np.arange(400), "train")
    captions = [world.caption(i, 0) for i in range(0, len(world), 4)]
    vocab = vocabulary.train_vocabulary(captions, 512, num_codes, 4)
    layout = sequences.Layout(2, 40, num_codes, 3, kind="packed", max_seq_len=max_seq_len)
    codes = np.zeros(num_codes, np.int32)
    examples = [pair(vocab.encode_text(text)[:40], codes) for text in captions]

    def draw(index, rng):
        docs = [examples[i] for i in rng.integers(len(examples), size=rng.integers(3))]
        plain = sequences.lay_out(layout, vocab, examples[index], docs)
        spans = masking.sample_spans(masking.Masking(), plain.segments, rng, 3)
        return sequences.as_row(vocab, sequences.mask(layout, vocab, plain, spans))

    found = packing.make_packed_batches(range(len(examples)), 8, 0, draw, max_seq_len, padding={})
    filled = [(batch["segment_ids"] > 0).mean() for batch in itertools.islice(found, 15)]
    assert np.mean(filled) >= 0.97


@pytest.mark.slow
def test_worker_processes_pack_the_same_sequences_in_rows_of_their_own_and_resume():
    one, other = batches(num_workers=2), batches(num_workers=2)
    first = [next(one) for _ in range(5)]
    state = json.loads(json.dumps(one.get_state()))
    rest = [next(one) for _ in range(40)]
    for batch in first:
        np.testing.assert_equal(next(other), batch)
    other.set_state(state)
    for batch in rest:
        np.testing.assert_equal(next(other), batch)
    counts = collections.Counter(
        record for row in rows_of(first + rest) for record in records_in(row)
    )
    # Each worker has every other window of 24, and what is in hand of its last ones is not yet seen.
    assert set(counts) == set(range(60))
    assert max(counts.values()) - min(counts.values()) <= 4


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=30))
def test_rows_also_keep_a_bound_on_what_is_not_counted_in_tokens(sizes):
    """Arrays with lengths of their own are joined in the order of their sequences."""
    examples = [
        {
            "tokens": np.full(length, i, np.int32),
            "segment_ids": np.ones(length, np.int32),
            "pictures": np.full(count, 100 + i, np.int32),
        }
        for i, (length, count) in enumerate(sizes)
    ]
    padding = {"tokens": 99, "pictures": -1}
    rows = packing.pack(examples, 12, padding, {"pictures": 5})
    found = []
    for row in rows:
        assert row["tokens"].shape == (12,) and row["pictures"].shape == (5,)
        own = [
            int(row["tokens"][row["segment_ids"] == n][0])
            for n in range(1, 13)
            if n in row["segment_ids"]
        ]
        pictures = [100 + i for i in own for _ in range(sizes[i][1])]
        assert row["pictures"].tolist() == pictures + [-1] * (5 - len(pictures))
        found += own
    assert sorted(found) == list(range(len(sizes)))
    with pytest.raises(ValueError, match="6 pictures is longer than a row of 5"):
        packing.pack([{**examples[0], "pictures": np.zeros(6)}], 12, padding, {"pictures": 5})


@given(
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=5),
)
def test_sequences_that_lie_one_after_another_are_joined_as_single_ones(sizes):
    rng, padding = np.random.default_rng(0), {"tokens": 9}
    rows = [
        [{"tokens": rng.integers(0, 9, n), "segment_ids": np.ones(n, np.int32)} for n in row]
        for row in sizes
    ]
    flat = {k: np.concatenate([s[k] for row in rows for s in row]) for k in rows[0][0]}
    lengths, counts = np.concatenate(sizes), [len(row) for row in sizes]
    found = packing.join_flat(flat, lengths, counts, 20, padding)
    for i, row in enumerate(rows):
        one = packing.join(row, 20, padding, {})
        np.testing.assert_equal({k: v[i] for k, v in found.items()}, one)
    with pytest.raises(ValueError, match="do not fit a row of 0"):
        packing.join_flat(flat, lengths, counts, 0, padding)
