"""Beam search: its scores are those of the model, and what bounds it; parity is with transformers' tests."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.decode import beam, sampler
from rag_mm.nn import decoder, param_trees

CONFIG = decoder.DecoderConfig(14, 1, 16, 2, 24, 32)
STOP, STEPS = 3, 5
LENGTHS = (3, 6)


def make_model():
    return decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0))


@functools.cache
def random_params():
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0, 0.7, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, param_trees.describe(make_model, None)[1])


def make_prompts():
    tokens, positions, segment_ids = np.zeros((3, 2, 6), np.int32)
    for row, n in enumerate(LENGTHS):
        tokens[row, -n:] = np.random.default_rng(row).integers(14, size=n)
        positions[row, -n:], segment_ids[row, -n:] = np.arange(n), 1
    return sampler.Prompts(tokens, positions, segment_ids, np.array(LENGTHS, np.int32))


def search(params=None, prompts=None, **kwargs):
    graphdef = param_trees.describe(make_model, None)[0]
    sizes = dict(num_steps=STEPS, stop=STOP, num_beams=4) | kwargs
    allowed = sizes.pop("allowed", np.ones(14, bool))
    prompts = make_prompts() if prompts is None else prompts
    params = random_params() if params is None else params
    return beam.search(params, prompts, allowed, graphdef=graphdef, **sizes)


@functools.cache
def forward():
    graphdef = param_trees.describe(make_model, None)[0]

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(graphdef, params)
        positions = jax.numpy.arange(tokens.shape[1], dtype=np.int32)[None]
        hidden = model(tokens, positions, None)
        return jax.nn.log_softmax(model.logits(hidden))

    return run


def log_prob(prompt, continuation):
    """Sum over the continuation, up to and with the stop token; and its length."""
    length = len(continuation)
    if STOP in continuation:
        length = continuation.index(STOP) + 1
    ids = np.array([[*prompt, *continuation]], np.int32)
    scores = np.asarray(forward()(random_params(), ids))[0]
    at = len(prompt) - 1
    return sum(scores[at + i, continuation[i]] for i in range(length)), length


def test_scores_are_the_models_and_the_best_come_first():
    prompts, found = make_prompts(), search(length_penalty=0.5)
    for row, n in enumerate(LENGTHS):
        prompt = prompts.tokens[row, -n:].tolist()
        texts = [tuple(each) for each in np.asarray(found.tokens)[row].tolist()]
        assert len(set(texts)) == 4
        for text, score in zip(texts, found.scores[row], strict=True):
            total, length = log_prob(prompt, list(text))
            assert float(score) == pytest.approx(float(total) / length**0.5, abs=1e-4)
        assert (np.diff(found.scores[row]) <= 0).all()


def test_one_beam_is_greedy_and_more_find_at_least_as_likely_texts():
    graphdef = param_trees.describe(make_model, None)[0]
    greedy = sampler.sample(
        random_params(),
        make_prompts(),
        np.zeros(2, np.uint32),
        np.ones(14, bool),
        graphdef=graphdef,
        num_steps=STEPS,
        sampling=sampler.Sampling(0.0),
        stop=STOP,
    )
    single = search(num_beams=1, length_penalty=0.0)
    np.testing.assert_array_equal(single.tokens[:, 0], greedy.tokens)
    assert (search(length_penalty=0.0).scores[:, 0] >= single.scores[:, 0] - 1e-5).all()


def test_least_lengths_and_forbidden_tokens_are_kept():
    allowed = np.ones(14, bool)
    allowed[[0, 5, 6]] = False
    found = np.asarray(search(min_steps=2, allowed=allowed).tokens)
    assert not np.isin(found, [0, 5, 6]).any()
    assert (found[:, :, :2] != STOP).all()
    with pytest.raises(ValueError, match="8 allowed tokens"):
        search(allowed=np.arange(14) < 7)


@pytest.mark.slow
def test_on_a_mesh_the_same_texts_are_found():
    _, abstract = param_trees.describe(make_model, sharding.make_mesh(2, 2, 2))
    params = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), random_params(), abstract
    )
    expected = search()
    for is_scanned in (False, True):
        found = search(params, is_scanned=is_scanned)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
