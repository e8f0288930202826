"""Scores of answers equal the logits of each whole text, however texts share their beginnings."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_lm
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.decode import decode_batch
from rag_mm.frozen_lm import scoring, token_tree
from rag_mm.frozen_lm.token_tree import Row
from rag_mm.nn import decoder, param_trees

PREFIX = "In: a cat\nOut: b\nIn: a dog\nOut: c\n"
PROMPTS = ["In: cat\nOut:", "In: dog\nOut:", "In:"]
CANDIDATES = [" cat", " dog", " cat in", "x", "é"]


@pytest.fixture(scope="module")
def model():
    return tiny_lm.make_lm()


def expected(model, prompts, candidates, prefix=""):
    rows = [[tiny_lm.reference(model, prefix + p, c) for c in candidates] for p in prompts]
    return np.array(rows)


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_scores_are_those_of_the_logits(model, prefix):
    found = model.score(PROMPTS, CANDIDATES, prefix=prefix)
    assert found.dtype == np.float32 and found.shape == (3, 5)
    wanted = expected(model, PROMPTS, CANDIDATES, prefix or "")
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.ptp(wanted) > 1


def test_a_token_over_the_border_is_the_candidates(model):
    """The whole text is tokenized: "at" after " c" is the token " cat", of which " c" is the beginning."""
    np.testing.assert_allclose(
        model.score(["In: c"], ["at"]), model.score(["In:"], [" cat"]), atol=1e-6
    )


def test_calibration_subtracts_the_mean_of_its_prompts(model):
    neutral = ["In: ?\nOut:", "In: in\nOut:"]
    found = model.score(PROMPTS, CANDIDATES, prefix=PREFIX, calibration=neutral)
    plain = expected(model, PROMPTS, CANDIDATES, PREFIX)
    mean = expected(model, neutral, CANDIDATES, PREFIX).mean(axis=0)
    np.testing.assert_allclose(found, plain - mean, atol=1e-4)


def test_a_start_token_is_what_an_empty_prompt_follows(model):
    started = tiny_lm.make_lm(with_start=True)
    np.testing.assert_allclose(
        started.score([""], [" cat", "x"]), expected(started, [""], [" cat", "x"]), atol=1e-4
    )
    with pytest.raises(UserError, match="Nothing precedes the candidate"):
        model.score([""], [" cat"])


def test_texts_of_any_length_and_number(model):
    """Longer than every bucket, and more than one chunk holds."""
    rng = np.random.default_rng(0)
    letters = lambda count: "".join(rng.choice(list("abcdef"), count))
    prompts = [letters(count) for count in (700, 3, 200, 150, 130, 120)]
    found = model.score(prompts, [" cat", "in"])
    np.testing.assert_allclose(found, expected(model, prompts, [" cat", "in"]), atol=1e-3)
    np.testing.assert_allclose(found[1:2], model.score(prompts[1:2], [" cat", "in"]), atol=1e-4)


def test_one_program_per_bucket():
    model = tiny_lm.make_lm(
        dataclasses.replace(tiny_lm.CONFIG, mlp_dim=40)
    )  # compiled nowhere else

    def new_programs(num_prompts, length, prefix):
        programs = scoring._prefill, scoring._extend, scoring._head
        before = [each._cache_size() for each in programs]
        prompts = [chr(97 + i) * length for i in range(num_prompts)]
        model.score(prompts, ["x", "y"], prefix=prefix)
        return [each._cache_size() - b for each, b in zip(programs, before, strict=True)]

    assert new_programs(2, 10, "p" * 20) == [1, 1, 1]
    assert new_programs(3, 15, "q" * 60) == [0, 0, 0]  # all up to 64
    assert new_programs(3, 30, "q" * 60) == [0, 1, 0]  # more tokens
    assert new_programs(2, 10, "p" * 65) == [1, 1, 0]  # a longer prefix
    assert new_programs(2, 10, None) == [0, 1, 0]  # no prefix


def test_no_token_is_computed_twice():
    rows = [Row((*range(20), 30 + i, 40, 50 + j), 22) for i in range(3) for j in range(4)]
    assert token_tree.trunk_of(rows) == tuple(range(20))
    (chunk,) = token_tree.chunks(rows, 20)
    assert len(chunk.tokens) == 3 * 2  # each prompt's own two tokens; the answers are targets only
    assert sorted(target.row for target in chunk.targets) == list(range(12))
    assert chunk.mask(8)[:6, :6].sum() == 3 * (1 + 2)
    small = list(token_tree.chunks(rows, 20, capacity=3))
    assert [len(each.tokens) for each in small] == [2, 2, 2]


def test_smeared_heads_are_scored_by_whole_rows():
    config = dataclasses.replace(tiny_lm.CONFIG, smear_lags=((1, 3), ()))
    model = tiny_lm.make_lm(config)
    found = model.score(PROMPTS, CANDIDATES, prefix=PREFIX)
    np.testing.assert_allclose(found, expected(model, PROMPTS, CANDIDATES, PREFIX), atol=1e-4)


@pytest.mark.parametrize("lags", [(), ((1,), ())])
def test_on_several_devices_it_scores_the_same(lags):
    config = dataclasses.replace(tiny_lm.CONFIG, smear_lags=lags, vocab_size=264)
    model = tiny_lm.make_lm(config)
    make = lambda: decoder.Decoder(config, rngs=nnx.Rngs(params=0))
    abstract = param_trees.describe(make, decode_batch.make_mesh((2, 1, 2)))[1]
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), model.params, abstract)
    split = dataclasses.replace(model, params=placed)
    np.testing.assert_allclose(
        split.score(PROMPTS, CANDIDATES, prefix=PREFIX),
        model.score(PROMPTS, CANDIDATES, prefix=PREFIX),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("prompts", "candidates", "reason"),
    [
        ([], ["x"], "There is no prompt"),
        (["a"], [], "There is no candidate"),
        (["a"], ["x", ""], "A candidate is the empty text"),
        ("abc", ["x"], "takes sequences of texts"),
        (["a" * 3000], ["x"], "3,001 tokens, but the model reads at most 2,048"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, prompts, candidates, reason):
    with pytest.raises(UserError, match=reason):
        model.score(prompts, candidates)


def test_the_vocabulary_is_the_text_of_each_id(model):
    words = model.vocabulary
    assert len(words) == tiny_lm.CONFIG.vocab_size
    assert words[tiny_lm.TOKENS.index("Ġcat")] == " cat" and words[tiny_lm.TOKENS.index("c")] == "c"
    assert words[tiny_lm.TOKENS.index("<s>")] == "<s>" and words[-3:] == ("", "", "")
