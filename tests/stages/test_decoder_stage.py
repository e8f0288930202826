"""Training rows: the control sees the same main documents, the other one what was retrieved for them."""

import dataclasses

import numpy as np
import pytest

from configs import quickstart
from rag_mm.core.errors import UserError
from rag_mm.data import rows, vocabulary
from rag_mm.stages import chain
from rag_mm.stages import decoder as decoder_stage

WORDS = vocabulary.train_vocabulary([], 256, 64, 4)
NUM_CODES, DRAWS = 4, 2
CONFIG = dataclasses.replace(
    chain.stage_configs(quickstart.tiny())["decoder"], caption_draws=DRAWS, mask_probability=0.0
)


def example(code: int, text: int = 1) -> rows.Example:
    """A document that is told by its only code."""
    return rows.Example([text], np.full(NUM_CODES, code, np.int32))


def make_source(max_docs: int, shares: tuple[float, ...], neighbors) -> decoder_stage.RowSource:
    """Two main documents with codes 0 and 1, whose text is the draw; memory rows have 10, 11, ..."""
    config = dataclasses.replace(CONFIG, max_docs=max_docs, docs_shares=shares)
    texts = [[example(i, draw) for draw in range(DRAWS)] for i in range(2)]
    memory = [example(10 + i) for i in range(8)]
    layout = rows.Layout(max_docs, 4, NUM_CODES, 2)
    return decoder_stage.RowSource(config, layout, WORDS, texts, memory, neighbors)


def codes_of(row: dict[str, np.ndarray]) -> list[int]:
    """The documents of a row in order, the main one last."""
    codes = row["tokens"][row["tokens"] >= WORDS.code_offset] - WORDS.code_offset
    return codes.reshape(-1, NUM_CODES)[:, 0].tolist()


NEIGHBORS = np.array(
    [[[0, 1], [2, 3], [4, 5]], [[6, 7], [6, -1], [-1, -1]]], np.int32
)  # [main document, draw or image, K]


def test_the_control_sees_the_same_main_documents():
    control = make_source(0, (1.0,), None)
    decoder = make_source(2, (0.2, 0.4, 0.4), NEIGHBORS)
    for index in range(2):
        for seed in range(20):
            one, other = (
                source.make(index, np.random.default_rng(seed)) for source in (control, decoder)
            )
            assert codes_of(one) == codes_of(other)[-1:] == [index]
            assert WORDS.decode_text(main_text(one)) == WORDS.decode_text(main_text(other))


def main_text(row: dict[str, np.ndarray]) -> list[int]:
    return row["tokens"][row["tokens"] < WORDS.text_size].tolist()[-1:]


def test_documents_come_from_the_caption_that_is_shown_or_from_the_image():
    source = make_source(2, (0.0, 0.0, 1.0), NEIGHBORS)
    seen = set()
    for seed in range(60):
        row = source.make(0, np.random.default_rng(seed))
        *docs, main = codes_of(row)
        (draw,) = main_text(row)
        assert main == 0
        assert sorted(docs) in (sorted(10 + NEIGHBORS[0, draw]), sorted(10 + NEIGHBORS[0, -1]))
        seen.add(tuple(docs))
    # Either order, of the two texts' documents and of the image's.
    assert len(seen) == 6


def test_a_missing_neighbor_is_left_out():
    source = make_source(2, (0.0, 0.0, 1.0), NEIGHBORS)
    found = {len(codes_of(source.make(1, np.random.default_rng(seed)))) - 1 for seed in range(40)}
    assert found == {0, 1, 2}


def test_counts_of_documents_follow_their_shares():
    source = make_source(2, (0.5, 0.5, 0.0), NEIGHBORS)
    counts = [len(codes_of(source.make(0, np.random.default_rng(s)))) - 1 for s in range(200)]
    assert set(counts) == {0, 1} and 0.4 < np.mean(counts) < 0.6


def test_shares_are_one_for_each_count():
    with pytest.raises(UserError, match="give 3"):
        dataclasses.replace(CONFIG, docs_shares=(1.0,))
