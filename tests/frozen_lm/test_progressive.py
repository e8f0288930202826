"""Progressive decoding: what is asked, in which order, and the baselines beside it."""

import types

import numpy as np
import pytest
import stand_in_words
from stand_in_words import GRIDS

from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import denoising, progressive
from rag_mm.frozen_lm.denoising import CodePair
from rag_mm.frozen_lm.progressive import ProgressiveConfig
from rag_mm.frozen_lm.word_text import WordTable

TABLE = WordTable(stand_in_words.WORDS)
ALL = np.ones(21, bool)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return CodePair(rng.integers(16, size=21), rng.integers(16, size=21))


def test_every_wanted_code_is_in_one_segment_of_its_level():
    wanted = ALL.copy()
    wanted[[0, 7]] = False
    found = dict(progressive.segments(GRIDS, wanted, 3))
    assert [[part.tolist() for part in parts] for parts in found.values()] == [
        [],
        [[1, 2, 3], [4]],
        [[5, 6, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17], [18, 19, 20]],
    ]


def test_a_parent_covers_its_place():
    above = progressive.parents(GRIDS)
    assert above[:5].tolist() == [0, 0, 0, 0, 0]
    assert above[5:].reshape(4, 4).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    uneven = progressive.parents(((1, 3), (2, 3)))
    assert uneven[3:].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("levels", [0, 2, 3])
def test_whoever_counts_writes_the_majority(pair, levels):
    """So a prompt shows the target of every example at the right places."""
    examples = denoising.noisy_pairs(pair, 16, num_clean=5, seed=1)
    reader, config = (
        stand_in_words.MajorityReader(),
        ProgressiveConfig(autoregressive_levels=levels),
    )
    start, done = CodePair(pair.condition, pair.condition), []
    written = progressive.write_codes(
        reader, TABLE, GRIDS, start, examples, ALL, config, on_segments=done.append
    )
    np.testing.assert_array_equal(written.codes, denoising.majority_codes(examples))
    assert written.is_valid.all() and done[-1] == 6 and len(reader.prompts) == 6


def test_later_levels_see_no_word_of_their_own_level(pair):
    """While each segment of the first two sees what was written before it."""
    reader = stand_in_words.MajorityReader()
    blank = CodePair(pair.condition, np.zeros(21, np.int32))
    example = CodePair(pair.condition, pair.target)
    config = ProgressiveConfig(segment=2, before=3, autoregressive_levels=2)
    progressive.write_codes(reader, TABLE, GRIDS, blank, [example], ALL, config)
    queries = [prompt[prompt.rindex("C: ") :] for prompt in reader.prompts]
    words = [TABLE.words[code] for code in pair.target]
    given = [TABLE.words[code] for code in pair.condition]
    assert queries[0] == f"C: {given[0]}\nA:"
    assert queries[2] == f"C: {given[3]} {given[4]}\nQ: {' '.join(words[:3])}\nA:"
    assert queries[3] == f"C: {given[5]} {given[6]}\nQ: {words[1]} {words[1]}\nA:"
    assert queries[-1] == f"C: {given[19]} {given[20]}\nQ: {words[4]} {words[4]}\nA:"


def test_what_is_not_wanted_stays_and_nonsense_becomes_the_fallback(pair):
    wanted = ALL.copy()
    wanted[:5] = False
    mute = types.SimpleNamespace(
        generate=lambda prompts, num_tokens: types.SimpleNamespace(texts=["?"] * len(prompts))
    )
    written = progressive.write_codes(mute, TABLE, GRIDS, pair, [pair], wanted)
    np.testing.assert_array_equal(written.codes, pair.target)
    np.testing.assert_array_equal(written.is_valid, ~wanted)
    with pytest.raises(UserError, match="at least one example"):
        progressive.write_codes(mute, TABLE, GRIDS, pair, [], wanted)


def test_noise_is_the_same_in_both_and_spares_the_first_codes(pair):
    copies = denoising.noisy_pairs(pair, 16, shares=(1.0, 0.0), num_clean=4)
    assert copies[0].condition[4:].tolist() == copies[0].target[4:].tolist()
    assert copies[0].target[:4].tolist() == pair.target[:4].tolist()
    assert copies[1].target.tolist() == pair.target.tolist()
    assert copies[1].condition.tolist() == pair.condition.tolist()


def test_ten_noisy_copies_give_the_image_away():
    target = np.random.default_rng(0).integers(1000, size=2000)
    copies = denoising.noisy_pairs(CodePair(target, target), 1000, num_clean=0)
    assert (denoising.majority_codes(copies) == target).mean() > 0.99
    assert (denoising.majority_codes(copies[:1]) == target).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("task", denoising.CONDITIONS)
def test_a_task_gives_another_image_of_the_same_size(task):
    image = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    given = denoising.CONDITIONS[task](image)
    assert given.shape == image.shape and given.dtype == np.uint8 and (given != image).any()
    wanted = denoising.wanted_codes(task, 8, GRIDS)
    assert wanted.shape == (21,) and wanted.any()


def test_the_codes_inside_and_outside_the_hole():
    inside = denoising.wanted_codes("inpaint", 8, GRIDS)
    outside = denoising.wanted_codes("outpaint", 8, GRIDS)
    assert inside[5:].reshape(4, 4).tolist() == np.pad(np.ones((2, 2), bool), 1).tolist()
    assert (inside ^ outside).all()
