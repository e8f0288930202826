"""NLL of given pictures: read where the codes are, over the whole vocabulary, batch by batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.data import sequences, token_documents, vocabulary
from rag_mm.decode import tasks
from rag_mm.eval import likelihood
from rag_mm.nn import decoder, param_trees

WORDS = vocabulary.train_vocabulary([], 256, 16, 4)
LAYOUT = sequences.Layout(max_docs=2, max_text_len=3, num_codes=5, max_spans=2)
CONFIG = decoder.DecoderConfig(WORDS.size, 1, 8, 2, 16, LAYOUT.num_positions)


def make_example(seed):
    rng = np.random.default_rng(seed)
    text = rng.integers(256, size=rng.integers(0, 4)).tolist()
    return token_documents.pair(text, rng.integers(16, size=5).astype(np.int32))


MAINS = [make_example(seed) for seed in range(5)]
DOCS = [[], [make_example(10)], [make_example(11), make_example(12)], [], [make_example(13)]]


@pytest.fixture(scope="module")
def generator():
    make_model = lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0))
    graphdef, abstract = param_trees.describe(make_model, None)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)
    return tasks.Generator(graphdef, jax.tree.map(draw, abstract), WORDS, LAYOUT)


@pytest.fixture(scope="module")
def scores(generator):
    """In batches of 2, the last of them half empty."""
    return likelihood.score_codes(generator, MAINS, DOCS, batch_size=2)


@pytest.fixture(scope="module")
def found(scores):
    return scores.nll


def test_each_code_costs_its_negative_log_probability_in_the_training_row(generator, scores):
    @jax.jit
    def log_probs(tokens, positions):
        model = nnx.merge(generator.graphdef, generator.params)
        hidden = model(tokens[None], positions[None], jnp.ones_like(tokens)[None])
        return jax.nn.log_softmax(model.logits(hidden)[0])

    assert scores.nll.shape == (5, 5) and scores.nll.dtype == np.float32
    for main, docs, nll, is_top1 in zip(MAINS, DOCS, *scores, strict=True):
        row = sequences.make_row(LAYOUT, WORDS, main, docs)
        after = np.asarray(log_probs(row["tokens"], row["positions"]))
        start, end = sequences.lay_out(LAYOUT, WORDS, main, docs).segments[-1]
        ids = main.codes + WORDS.code_offset
        np.testing.assert_array_equal(row["tokens"][start:end], ids)
        expected = -after[np.arange(start - 1, end - 1), ids]
        np.testing.assert_allclose(nll, expected, atol=1e-4)
        np.testing.assert_array_equal(is_top1, after[start - 1 : end - 1].argmax(1) == ids)


def test_split_over_a_mesh_the_scores_are_the_same(generator, scores):
    """As a training run watches them: the batch of 2 grows to one row a device, and all rows come back."""
    mesh = sharding.make_mesh(data=4, fsdp=2)
    _, abstract = param_trees.describe(
        lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0)), mesh
    )
    params = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), generator.params, abstract
    )
    with jax.set_mesh(mesh):
        spread = tasks.Generator(generator.graphdef, params, WORDS, LAYOUT)
        found = likelihood.score_codes(spread, MAINS, DOCS, batch_size=2)
    np.testing.assert_allclose(found.nll, scores.nll, atol=1e-5)
    np.testing.assert_array_equal(found.is_top1, scores.is_top1)


def test_as_many_rows_are_computed_as_are_asked_for(generator, monkeypatch):
    """Up to the next power of two, and never the whole batch of 64."""
    sizes, score = [], likelihood._score
    count = lambda params, batch, **rest: (
        sizes.append(len(batch["tokens"])) or score(params, batch, **rest)
    )
    monkeypatch.setattr(likelihood, "_score", count)
    for num in (1, 3):
        assert len(likelihood.score_codes(generator, MAINS[:num], DOCS[:num]).nll) == num
    assert sizes == [1, 4]


def test_other_rows_of_the_batch_change_nothing(generator, found):
    backwards = likelihood.score_codes(generator, MAINS[::-1], DOCS[::-1], batch_size=2).nll
    np.testing.assert_allclose(backwards[::-1], found, atol=1e-4)


def test_documents_matter_and_later_codes_do_not(generator, found):
    bare = likelihood.score_codes(generator, MAINS, [[]] * 5, batch_size=2).nll
    np.testing.assert_allclose(bare[[0, 3]], found[[0, 3]], atol=1e-4)
    assert (np.abs(bare[[1, 2, 4]] - found[[1, 2, 4]]).max(1) > 1e-3).all()
    changed = [
        token_documents.pair(m.text, np.r_[m.codes[:4], (m.codes[4] + 1) % 16]) for m in MAINS
    ]
    other = likelihood.score_codes(generator, changed, DOCS, batch_size=2).nll
    np.testing.assert_allclose(other[:, :4], found[:, :4], atol=1e-4)
    assert (np.abs(other[:, 4] - found[:, 4]) > 1e-4).all()
