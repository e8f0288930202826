"""Training sequences: the baseline sees the same main documents, the decoder also retrieved ones."""

import dataclasses
import itertools

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.core.roles import MAIN
from rag_mm.data import sequences, token_documents, vocabulary
from rag_mm.stages.ra_cm3.training_sequences import MaskingConfig, SequencesConfig, SequenceSource

VOCABULARY = vocabulary.train_vocabulary([], 256, 64, 4)
NUM_CODES, CAPTIONS, BATCH_SIZE = 4, 2, 4
CONFIG = SequencesConfig(
    captions_per_image=CAPTIONS,
    num_docs_weights=(0.2, 0.4, 0.4),
    max_text_len=4,
    mean_doc_text_len=1,
)


def example(code: int, text: int = 1) -> token_documents.Example:
    """A document recognized by its only code."""
    return token_documents.pair([text], np.full(NUM_CODES, code, np.int32))


def make_source(
    neighbors, caption_prob=0.0, mask_prob=0.0, min_spans=0, **changes
) -> SequenceSource:
    """Two main documents with codes 0 and 1, with the caption's number as text; the memory has 10, 11, ..."""
    config = dataclasses.replace(CONFIG, **changes)
    texts = [[example(i, caption) for caption in range(CAPTIONS)] for i in range(2)]
    memory = [example(10 + i) for i in range(8)]
    max_docs = 0 if neighbors is None else config.max_docs
    layout = sequences.Layout(max_docs, config.max_text_len, NUM_CODES, max_spans=3)
    masking = MaskingConfig(prob=mask_prob, caption_prob=caption_prob, min_spans=min_spans)
    return SequenceSource(config, masking, layout, VOCABULARY, texts, memory, neighbors)


def codes_of(row: dict[str, np.ndarray]) -> list[int]:
    """The documents of a row in order, the main one last."""
    codes = row["tokens"][row["tokens"] >= VOCABULARY.code_offset] - VOCABULARY.code_offset
    return codes.reshape(-1, NUM_CODES)[:, 0].tolist()


NEIGHBORS = np.array(
    [[[0, 1], [2, 3], [4, 5]], [[6, 7], [6, -1], [-1, -1]]], np.int32
)  # [main document, caption or image, K]


def take(source: SequenceSource, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(source.batches(BATCH_SIZE, seed=0), count))


def rows_of(batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    return [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(4)]


def test_the_baseline_sees_the_same_main_documents_in_the_same_order():
    decoder = take(make_source(NEIGHBORS), 10)
    control = take(make_source(None), 10)
    for one, other in zip(rows_of(decoder), rows_of(control), strict=True):
        assert codes_of(one)[-1:] == codes_of(other)
        assert main_text(one) == main_text(other)


def test_a_batch_is_as_long_as_its_number_of_documents_wants():
    source = make_source(NEIGHBORS, num_docs_weights=(0.25, 0.25, 0.5))
    batches = take(source, 8)
    lengths = [batch["tokens"].shape[1] for batch in batches]
    assert sorted(lengths) == sorted(
        [source.length(0)] * 2 + [source.length(1)] * 2 + [source.length(2)] * 4
    )
    for batch, length in zip(batches, lengths, strict=True):
        # A short row loses nothing but padding.
        most = {source.length(k): k for k in range(3)}[length]
        assert all(len(codes_of(row)) <= most + 1 for row in rows_of([batch]))
        assert (batch["roles"] == MAIN).sum() == 4 * (1 + 1 + NUM_CODES + 1)
    control = take(make_source(None), 8)
    assert {batch["tokens"].shape[1] for batch in control} == {source.length(0)}


def main_text(row: dict[str, np.ndarray]) -> list[int]:
    return row["tokens"][row["tokens"] < VOCABULARY.text_size].tolist()[-1:]


def test_documents_come_from_the_caption_that_is_shown_or_from_the_image():
    source = make_source(NEIGHBORS)
    seen = set()
    for seed in range(60):
        row = source.make(0, np.random.default_rng(seed), 2)
        *docs, main = codes_of(row)
        (draw,) = main_text(row)
        assert main == 0
        assert sorted(docs) in (sorted(10 + NEIGHBORS[0, draw]), sorted(10 + NEIGHBORS[0, -1]))
        seen.add(tuple(docs))
    # Either order, of the two texts' documents and of the image's.
    assert len(seen) == 6


def test_a_full_caption_stands_before_what_a_shorter_one_retrieved():
    source = make_source(NEIGHBORS, full_caption_prob=1.0)
    for draws in source.texts:
        draws.append(example(int(draws[0].codes[0]), text=9))
    made = [source.make(0, np.random.default_rng(seed), 2) for seed in range(40)]
    assert all(main_text(row) == [9] for row in made)
    found = {tuple(sorted(codes_of(row)[:-1])) for row in made}
    assert found == {(10, 11), (12, 13), (14, 15)}


def test_noise_is_read_in_the_main_image_and_never_foreseen():
    plain, noisy = make_source(NEIGHBORS), make_source(NEIGHBORS, code_noise=0.5)
    num_wrong = 0
    for seed in range(50):
        one, other = (each.make(0, np.random.default_rng(seed), 2) for each in (plain, noisy))
        for name in ("targets", "positions", "roles", "segment_ids"):
            np.testing.assert_array_equal(one[name], other[name])
        changed = np.flatnonzero(one["tokens"] != other["tokens"])
        assert (
            one["tokens"][changed] == VOCABULARY.code_offset
        ).all()  # The main document's only code.
        assert set(other["tokens"][changed]) <= set(one["tokens"])
        num_wrong += len(changed)
    # Half of 4 codes, of which some are replaced by an equal one.
    assert 0.2 < num_wrong / (50 * NUM_CODES) < 0.5


@pytest.mark.parametrize("mask_prob", [0.0, 1.0])
@pytest.mark.parametrize("num_docs", [0, 2])
def test_noise_reveals_no_code_that_is_still_to_come(num_docs, mask_prob):
    """The main image has codes of its own, all different, and every one that can is replaced."""
    plain, noisy = (
        make_source(NEIGHBORS, mask_prob=mask_prob, code_noise=noise) for noise in (0.0, 1.0)
    )
    main = token_documents.pair([1], np.arange(NUM_CODES, dtype=np.int32))
    for source in (plain, noisy):
        source.texts[0] = [main] * CAPTIONS
    offset, replacements = VOCABULARY.code_offset, set()
    for seed in range(100):
        one, other = (
            each.make(0, np.random.default_rng(seed), num_docs)["tokens"] - offset
            for each in (plain, noisy)
        )
        is_main = (one >= 0) & (one < NUM_CODES)
        np.testing.assert_array_equal(one[~is_main], other[~is_main])
        changed = np.flatnonzero(one != other)
        for at in changed:
            assert other[at] in one[:at] and other[at] not in one[at:][is_main[at:]]
        replacements |= set(other[changed])
        first = np.flatnonzero(one >= 0)[0]
        assert other[first] == one[first]
    assert replacements & set(range(NUM_CODES))
    assert bool(replacements - set(range(NUM_CODES))) == (num_docs > 0)


def test_the_main_caption_alone_is_masked_where_describing_is_practised():
    source = make_source(NEIGHBORS, caption_prob=1.0)
    for seed in range(20):
        row = source.make(0, np.random.default_rng(seed), 2)
        tokens = row["tokens"][row["segment_ids"] > 0].tolist()
        hole, moved = (i for i, token in enumerate(tokens) if token == VOCABULARY.sentinel(0))
        assert tokens[hole + 1] == VOCABULARY.brk and tokens[moved - 1] == VOCABULARY.eod
        assert tokens[moved + 1] in range(CAPTIONS) and tokens[moved + 2 :] == [VOCABULARY.eoss]
        assert VOCABULARY.sentinel(1) not in tokens


@pytest.mark.parametrize(("min_spans", "shares"), [(0, (0.5, 0.75)), (1, (1.0, 1.0))])
def test_a_masked_sequence_may_be_required_to_have_a_span(min_spans, shares):
    """Poisson(1) is 0 in 37 % of draws."""
    source = make_source(NEIGHBORS, mask_prob=1.0, min_spans=min_spans)
    rows = [source.make(0, np.random.default_rng(seed), 1) for seed in range(200)]
    masked = np.mean([(row["tokens"] == VOCABULARY.sentinel(0)).any() for row in rows])
    assert shares[0] <= masked <= shares[1]


def test_a_missing_neighbor_is_left_out():
    source = make_source(NEIGHBORS)
    made = [source.make(1, np.random.default_rng(seed), 2) for seed in range(40)]
    found = {len(codes_of(row)) - 1 for row in made}
    assert found == {0, 1, 2}


def test_a_row_that_is_too_long_loses_its_first_document():
    """There is room for four tokens of text, and one document of main document 0 has four itself."""
    source = make_source(NEIGHBORS, mean_doc_text_len=0)
    source.memory[0] = token_documents.pair([1] * 4, np.full(NUM_CODES, 9, np.int32))
    found = {tuple(codes_of(source.make(0, np.random.default_rng(s), 2))) for s in range(80)}
    whole = {(12, 13, 0), (13, 12, 0), (14, 15, 0), (15, 14, 0)}
    assert found == whole | {(11, 0), (9, 0)}


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (SequencesConfig, "full_caption_prob"),
        (SequencesConfig, "code_noise"),
        (MaskingConfig, "prob"),
        (MaskingConfig, "segment_prob"),
        (MaskingConfig, "caption_prob"),
    ],
)
def test_a_probability_is_between_0_and_1(group, name):
    with pytest.raises(ValueError, match=f"{name} is 1.5"):
        group(**{name: 1.5})


def test_there_is_one_weight_for_each_number_of_documents():
    with pytest.raises(UserError, match="give 3"):
        dataclasses.replace(CONFIG, num_docs_weights=(1.0,))


def test_images_may_come_first_in_all_documents_of_a_sequence():
    source = make_source(NEIGHBORS, image_first_prob=0.5)
    orders = set()
    for seed in range(30):
        tokens = source.make(0, np.random.default_rng(seed), 2)["tokens"]
        is_code = tokens >= VOCABULARY.code_offset
        is_text = tokens < VOCABULARY.text_size
        kinds = "".join("i" if c else "t" for c in is_code[is_code | is_text])
        orders.add(kinds.replace("iiii", "i"))
    assert {"ti" * 3, "it" * 3} <= orders
    assert orders <= {"ti" * n for n in (1, 2, 3)} | {"it" * n for n in (1, 2, 3)}


def test_packed_rows_hold_the_same_documents_without_padding():
    source = make_source(NEIGHBORS)
    layout = dataclasses.replace(source.layout, kind="packed", max_seq_len=64)
    source = dataclasses.replace(source, layout=layout)
    filled, counts = [], set()
    for batch in take(source, 6):
        assert batch["tokens"].shape == (BATCH_SIZE, 64)
        for row in rows_of([batch]):
            filled.append((row["segment_ids"] > 0).mean())
            for number in range(1, row["segment_ids"].max() + 1):
                inside = row["segment_ids"] == number
                assert row["positions"][inside].tolist() == list(range(inside.sum()))
                counts.add(len(codes_of({"tokens": row["tokens"][inside]})) - 1)
    assert counts == {0, 1, 2} and np.mean(filled) > 0.9
    assert source.mean_length == 64


def test_main_images_come_in_all_sizes_and_say_which():
    sized = vocabulary.train_vocabulary([], 256, 64, 4, image_sizes=(32, 16))
    source = make_source(NEIGHBORS)
    small = np.array([[7, 8], [7, 8]], np.int32)
    layout = dataclasses.replace(source.layout, num_codes=NUM_CODES + 1)
    source = dataclasses.replace(source, vocabulary=sized, layout=layout, resized=(small,))
    found = set()
    for seed in range(20):
        tokens = source.make(0, np.random.default_rng(seed), 1)["tokens"]
        at = np.flatnonzero(np.isin(tokens, [sized.size_token(32), sized.size_token(16)]))[-1]
        codes = tokens[at + 1 :][: {32: 4, 16: 2}[32 if tokens[at] == sized.size_token(32) else 16]]
        found.add((int(tokens[at]), tuple(codes - sized.code_offset)))
        assert tokens[at + 1 + len(codes)] == sized.eod
    assert found == {(sized.size_token(32), (0, 0, 0, 0)), (sized.size_token(16), (7, 8))}
