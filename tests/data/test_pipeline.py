"""Batches are a function of (seed, index): shuffled, transformed, resumed to the item."""

import itertools
import json

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import pipeline


class Numbers:
    """Records 0..9."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index


def transform(number, rng):
    return {"number": np.int32(number), "noise": rng.random(2)}


def make_batches(seed=0, **options):
    return pipeline.make_batches(Numbers(), 4, seed, transform, **options)


class Unprintable(Numbers):
    """As records of a corpus, whose repr takes a minute."""

    def __repr__(self):
        raise AssertionError("a repr of all records was made")

    def transform(self, number, rng):
        return transform(number, rng)


def test_no_repr_of_the_records_is_made():
    records = Unprintable()
    next(pipeline.make_batches(records, 4, 0, records.transform))


def take(batches, n):
    return list(itertools.islice(batches, n))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_stacked_dicts():
    batch = next(make_batches())
    assert batch["number"].shape == (4,) and batch["number"].dtype == np.int32
    assert batch["noise"].shape == (4, 2)


def test_a_batch_says_which_records_it_was_made_of():
    for batch in take(make_batches(), 5):
        np.testing.assert_array_equal(batch[pipeline.RECORDS], batch["number"])


def test_each_epoch_holds_every_record_in_its_own_order():
    numbers = np.concatenate([b["number"] for b in take(make_batches(), 10)]).reshape(4, 10)
    assert (np.sort(numbers, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in numbers.tolist()}) == 4
    noise = np.concatenate([b["noise"] for b in take(make_batches(), 10)])
    assert len(np.unique(noise)) == noise.size  # A record gets new randomness in each epoch.


def test_resuming_gives_what_was_to_come():
    unbroken = take(make_batches(), 12)
    first = make_batches()
    assert_same(take(first, 5), unbroken[:5])
    state = json.loads(json.dumps(first.get_state()))
    second = make_batches()
    second.set_state(state)
    assert_same(take(second, 7), unbroken[5:])


def test_the_seed_decides():
    assert_same(take(make_batches(seed=3), 6), take(make_batches(seed=3), 6))
    by_seed = [
        np.concatenate([b["number"] for b in take(make_batches(seed=seed), 5)]).reshape(2, 10)
        for seed in (0, 1)
    ]
    assert not np.array_equal(*by_seed)
    # Nor is the next seed the same run one epoch later.
    assert not np.array_equal(by_seed[0][1], by_seed[1][0])


def make_whole(**options):
    return make_batches(whole_epochs=True, **options)


def make_arrays(seed=0, **options):
    squares = np.arange(10, dtype=np.int32) ** 2
    take = lambda records: {"number": records.astype(np.int32), "square": squares[records]}
    return pipeline.make_array_batches(10, 4, seed, take, **options)


@pytest.mark.parametrize("make", [make_whole, make_arrays])
def test_a_batch_of_a_whole_epoch_holds_no_record_twice(make):
    """Ten records are two batches of four an epoch; the two left out are others each time."""
    epochs = np.stack([b["number"] for b in take(make(), 60)]).reshape(30, 8)
    assert all(len(set(epoch)) == 8 for epoch in epochs.tolist())
    assert set(epochs.ravel()) == set(range(10))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 30
    # Where epochs are joined, some batch does hold one twice.
    assert any(len(set(b["number"].tolist())) < 4 for b in take(make_batches(), 60))


def test_an_epoch_that_batches_fill_holds_every_record_once():
    number = lambda record, rng: {"number": record}
    for batches in (
        pipeline.make_batches(np.arange(12), 4, 5, number, whole_epochs=True),
        pipeline.make_array_batches(12, 4, 5, lambda records: {"number": records}),
    ):
        epochs = np.stack([b["number"] for b in take(batches, 15)]).reshape(5, 12)
        assert (np.sort(epochs, axis=1) == np.arange(12)).all()


def test_whole_epochs_change_nothing_where_batches_fill_an_epoch():
    """Otherwise they would change what stages whose records fill theirs have trained on."""
    make = lambda **options: pipeline.make_batches(np.arange(12), 4, 0, transform, **options)
    assert_same(take(make(whole_epochs=True), 9), take(make(), 9))


@pytest.mark.parametrize("make", [make_whole, make_arrays])
def test_whole_epochs_resume_and_split_over_processes(make):
    unbroken = take(make(), 11)
    first, second = make(), make()
    assert_same(take(first, 5), unbroken[:5])
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert_same(take(second, 6), unbroken[5:])
    shares = [make(rows=range(*bounds)) for bounds in ((0, 1), (1, 4))]
    for batch in unbroken:
        parts = [next(share) for share in shares]
        for name, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), values)


def test_arrays_are_taken_by_record_and_the_seed_decides():
    batches = take(make_arrays(), 6)
    for batch in batches:
        np.testing.assert_array_equal(batch["square"], batch["number"] ** 2)
        np.testing.assert_array_equal(batch[pipeline.RECORDS], batch["number"])
    assert_same(take(make_arrays(), 6), batches)
    other = take(make_arrays(seed=1), 6)
    assert any((a["number"] != b["number"]).any() for a, b in zip(batches, other, strict=True))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
    unbroken = take(make_batches(), 9)
    first, second = make_batches(num_workers=2), make_batches(num_workers=2)
    assert_same(take(first, 5), unbroken[:5])
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert_same(take(second, 4), unbroken[5:])


def test_too_few_records_are_named():
    with pytest.raises(UserError, match="0 records"):
        pipeline.make_batches([], 32, 0, transform)
    with pytest.raises(UserError, match="10 records do not fill one batch of 11"):
        pipeline.make_batches(Numbers(), 11, 0, transform, whole_epochs=True)
    with pytest.raises(UserError, match="10 records do not fill one batch of 11"):
        pipeline.make_array_batches(10, 11, 0, dict)
