"""Batches from a mixture of corpora are the same for any number of processes, workers and interruptions."""

import itertools
import json

import numpy as np
import pytest
from corpus_cases import build, documents, make_vocabulary, one_by_one

from rag_mm.core.errors import UserError
from rag_mm.corpus import corpus_loader
from rag_mm.corpus.packing_plan import MixturePart, RowsConfig
from rag_mm.data import pipeline, sequences

LENGTH, BATCH = 64, 4
VOCABULARY = make_vocabulary()
LAYOUT = sequences.Layout(1, 16, 4, 0, sequences.PACKED, LENGTH)
PADDING = {"tokens": VOCABULARY.pad, "targets": VOCABULARY.pad}


@one_by_one
def draw(main, docs, rng):
    """A plain sequence; its roles are random numbers."""
    row = sequences.as_row(VOCABULARY, sequences.lay_out(LAYOUT, VOCABULARY, main, docs))
    return row | {"roles": rng.integers(0, 100, len(row["roles"]))}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    first, second = build(folder / "a", documents(20)), build(folder / "b", documents(7, 20))
    return [MixturePart(first, 2.0), MixturePart(second, 1.0)]


CONFIG = RowsConfig(LENGTH, max_text_len=16, window=16)


def batches(parts, **options):
    return corpus_loader.make_batches(parts, CONFIG, BATCH, draw, padding=PADDING, **options)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)


def test_rows_hold_whole_documents(parts):
    texts = {}
    for batch in itertools.islice(batches(parts), 6):
        assert batch["tokens"].shape == (BATCH, LENGTH)
        for tokens, ids, records in zip(
            batch["tokens"], batch["segment_ids"], batch[pipeline.RECORDS], strict=True
        ):
            assert (records[ids == 0] == -1).all() and (tokens[ids == 0] == VOCABULARY.pad).all()
            for number in range(1, ids.max() + 1):
                (record,) = set(records[ids == number].tolist())
                text = tokens[ids == number]
                texts[record] = VOCABULARY.decode_text(text[1 : list(text).index(VOCABULARY.brk)])
    # Documents of the second corpus are numbered behind those of the first.
    assert len(texts) > 20 and set(texts) <= set(range(27))
    assert all(text == f"thing number{record}" for record, text in texts.items())


def test_a_state_resumes_exactly(parts):
    iterator = batches(parts)
    taken, states = [], []
    for _ in range(7):
        states.append(json.loads(json.dumps(iterator.get_state())))
        taken.append(next(iterator))
    for state, batch in zip(states[::3], taken[::3], strict=True):
        resumed = batches(parts)
        resumed.set_state(state)
        assert_equal(next(resumed), batch)
    with pytest.raises(UserError, match="mixes 2 corpora, not 1"):
        batches(parts[:1]).set_state(states[1])


def test_processes_share_the_rows_of_a_batch(parts):
    whole, first, second = batches(parts), *(batches(parts, rows=range(i, i + 2)) for i in (0, 2))
    for _ in range(4):
        both = [next(first), next(second)]
        joined = {name: np.concatenate([part[name] for part in both]) for name in both[0]}
        assert_equal(joined, next(whole))
    # Whoever made a checkpoint, all resume from it.
    first.set_state(whole.get_state())
    assert_equal(next(first), {k: v[:2] for k, v in next(whole).items()})


def test_workers_take_turns(parts):
    """What Grain does to the dataset that it copies to each of its workers."""
    ahead = batches(parts)
    of_worker = []
    for worker in range(2):
        dataset = corpus_loader.make_dataset(parts, CONFIG, BATCH, draw, padding=PADDING)
        dataset.set_slice(slice(worker, None, 2))
        of_worker.append(iter(dataset))
    for i in range(6):
        assert_equal(next(of_worker[i % 2]), next(ahead))


@pytest.mark.slow
def test_batches_of_worker_processes_are_those_of_a_thread(parts):
    plain = batches(parts)
    for batch in itertools.islice(batches(parts, num_workers=2), 6):
        assert_equal(batch, next(plain))
