"""Sequences of instruction tuning: tasks by their shares, answers masked, documents before given pictures."""

import collections
import itertools

import numpy as np
import pytest

from rag_mm.core.roles import MAIN
from rag_mm.data import sequences, token_documents, vocabulary
from rag_mm.data.instruction_items import CodedItem, InstructionItem
from rag_mm.stages.cm3leon import instruction_sequences
from rag_mm.stages.cm3leon.instruction_sequences import InstructionSource, TaskData

V = vocabulary.train_vocabulary([], 256, 64, 4)
LAYOUT = sequences.Layout(max_docs=2, max_text_len=40, num_codes=4, max_spans=3)
PACKED = sequences.Layout(2, 40, 4, 3, kind=sequences.PACKED, max_seq_len=400)
MEMORY = [token_documents.pair([i], np.full(4, 10 + i, np.int32)) for i in range(4)]
NONE = np.full(2, -1, np.int32)


def codes(value):
    return np.full(4, value, np.int32)


def make_source(layout=LAYOUT, mask=0.0, noise=0.0, shares=(0.5, 0.3, 0.2)):
    edit = CodedItem("edit", {"edit": "to red"}, codes(1), (codes(2),))
    ask = CodedItem("what", {"question": "what?", "answer": "apple"}, codes(3))
    draw = CodedItem("text_to_image", {"caption": "an apple"}, codes(4))
    rows = np.array([0, 1], np.int32)
    tasks = {
        "edit": TaskData([edit], [NONE], (1.0,), shares[0]),
        "what": TaskData([ask], [rows], (0.0, 1.0), shares[1]),
        "text_to_image": TaskData([draw], [rows], (0.0, 0.0, 1.0), shares[2]),
    }
    return InstructionSource(tasks, MEMORY, layout, V, mask, noise, mean_doc_text_len=11)


def pictures(row, segment=1):
    """The pictures of a sequence in order, each by its only code."""
    tokens = row["tokens"][row["segment_ids"] == segment]
    found = tokens[tokens >= V.code_offset] - V.code_offset
    return found.reshape(-1, 4)[:, 0].tolist()


def rows_of(batch):
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["tokens"]))]


def test_batches_of_one_length_hold_the_tasks_by_their_shares():
    source = make_source()
    assert source.shares_by_docs == [{}, {"edit": 0.5, "what": 0.3}, {"text_to_image": 0.2}]
    counts = collections.Counter()
    for batch in itertools.islice(source.batches(4, seed=0), 100):
        lengths = {source.length(1), source.length(2)}
        assert batch["tokens"].shape[1] in lengths and not (batch["tokens"][:, -1] == V.eod).all()
        for row in rows_of(batch):
            counts[pictures(row)[-1]] += 1
    total = sum(counts.values())
    assert {code: round(count / total, 1) for code, count in counts.items()} == {
        1: 0.5,
        3: 0.3,
        4: 0.2,
    }
    lengths = {source.length(1): 0.8, source.length(2): 0.2}
    assert source.mean_length == pytest.approx(sum(n * share for n, share in lengths.items()))


def test_what_comes_before_the_main_picture():
    """The given picture of an edit; the retrieved documents, in any order, of others."""
    source, seen = make_source(), collections.defaultdict(set)
    for number in range(40):
        rng = np.random.default_rng(number)
        row = source.make(np.int64(0), rng, num_docs=1 + number % 2)
        *before, main = pictures(row)
        seen[main].add(tuple(before))
    assert seen == {1: {(2,)}, 3: {(10,), (11,)}, 4: {(10, 11), (11, 10)}}


def test_answers_are_masked_and_other_texts_sometimes():
    source = make_source(mask=0.5)
    masked = collections.defaultdict(list)
    for number in range(60):
        row = source.make(np.int64(0), np.random.default_rng(number), num_docs=1 + number % 2)
        tokens = row["tokens"].tolist()
        main = pictures(row)[-1]
        is_masked = V.sentinel(0) in tokens
        masked[main].append(is_masked)
        if main == 3:
            end = tokens.index(V.eod, 1)  # EOD, S0, answer; EOSS is a target only.
            answer = V.decode_text([i for i in tokens[end + 2 :] if i < V.text_size])
            assert answer.strip() == "apple"
            assert row["targets"][row["roles"] == MAIN][-1] == V.eoss
        elif is_masked:
            before = tokens.index(V.sentinel(0))
            assert tokens[before - 1] == V.brk and tokens[before + 1] == V.brk  # a null prompt
    assert all(masked[3])
    assert 0.3 < np.mean(masked[1] + masked[4]) < 0.7


def test_only_a_picture_that_is_asked_for_gets_noise():
    source = make_source(noise=1.0)
    noisy = collections.Counter()
    for number in range(40):
        row = source.make(np.int64(0), np.random.default_rng(number), num_docs=1)
        tokens, targets = row["tokens"], row["targets"]
        is_code = targets >= V.code_offset
        wanted = (targets[is_code] - V.code_offset)[-4:]
        read = (tokens[tokens >= V.code_offset] - V.code_offset)[-4:]
        noisy[int(wanted[-1]), bool((read != wanted).any())] += 1
    assert noisy[1, True] and not noisy[1, False]
    assert noisy[3, False] and not noisy[3, True]


def test_a_document_that_does_not_fit_is_left_out():
    source = make_source()
    long = token_documents.pair(list(range(40)), codes(12))
    source = InstructionSource(source.tasks, [long] * 4, LAYOUT, V, 0.0, 0.0, mean_doc_text_len=11)
    row = source.make(np.int64(0), np.random.default_rng(0), num_docs=2)
    assert len(row["tokens"]) == source.length(2)
    assert pictures(row) == [12, 4]


def test_packed_rows_hold_several_tasks():
    source = make_source(PACKED)
    batch = next(iter(source.batches(8, seed=0)))
    assert batch["tokens"].shape == (8, 400) and source.mean_length == 400
    found = {
        pictures(row, segment)[-1]
        for row in rows_of(batch)
        for segment in range(1, row["segment_ids"].max() + 1)
    }
    assert found == {1, 3, 4}


def test_a_batch_does_not_depend_on_the_processes_that_share_it():
    whole = next(iter(make_source(mask=0.5).batches(4, seed=3)))
    half = next(iter(make_source(mask=0.5).batches(4, seed=3, rows=range(2, 4))))
    np.testing.assert_array_equal(whole["tokens"][2:], half["tokens"])


def test_pictures_are_encoded_once_and_in_order():
    calls = []

    def tokenize(pixels):
        calls.append(len(pixels))
        return pixels[:, 0, 0, :1].astype(np.int32)

    def picture(value, side=2):
        return np.full((side, side, 3), value, np.uint8)

    items = [
        InstructionItem("a", "edit", {"edit": "x"}, picture(7), (picture(5),)),
        InstructionItem("b", "edit", {"edit": "y"}, picture(5), (picture(9, side=4),)),
    ]
    coded = list(instruction_sequences.encode(items, tokenize, 2))
    assert calls == [3]
    assert [(int(item.given[0][0]), int(item.codes[0])) for item in coded] == [(5, 7), (9, 5)]
    assert coded[1].fields == {"edit": "y"}
