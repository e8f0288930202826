"""A trained text and image decoder as a language model of its texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.data import sequences, token_documents, vocabulary
from rag_mm.decode.tasks import Generator
from rag_mm.frozen_lm import decoder_texts
from rag_mm.nn.decoder import DecoderConfig

TEXTS = ["red apple on blue", "Straße with a tree"]


@functools.partial(jax.jit, static_argnames="graphdef")
def logits_of(params, tokens, positions, graphdef):
    decoder = nnx.merge(graphdef, params)
    return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))[0]


def make(folds_case: bool = False, lags=((1,), ())) -> decoder_texts.DecoderTexts:
    tokenizer = vocabulary.train_vocabulary(TEXTS * 3, 270, 4, 2).tokenizer
    ours = vocabulary.Vocabulary(tokenizer, 4, 2, folds_case=folds_case)
    layout = sequences.Layout(max_docs=1, max_text_len=24, num_codes=4, max_spans=1)
    config = DecoderConfig(
        vocab_size=ours.size + 5,
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        mlp_dim=32,
        max_seq_len=layout.num_positions,
        positions="sinusoidal",  # Absolute: a text's place matters.
        smear_lags=lags,
    )
    return decoder_texts.make(Generator(*tiny_lm.make_params(config), ours, layout))


@pytest.fixture(scope="module")
def model():
    return make()


def expected(model, text, candidate):
    """From the decoder on the sequence that training lays out: EOD, text."""
    generator = model.generator
    ids, ours = model.text.encode_text(text + candidate), generator.vocabulary
    own = len(model.text.encode_text(text))
    assert ids[:own] == model.text.encode_text(text)
    example = token_documents.pair(ids[1:], np.zeros(4, np.int32))
    plain = sequences.lay_out(generator.layout, ours, example)
    tokens, positions = (x[None, : len(ids)] for x in (plain.tokens, plain.positions))
    assert tokens[0].tolist() == ids and positions[0, 0] > 0
    padded = (np.pad(x, ((0, 0), (0, 32 - x.shape[1]))) for x in (tokens, positions))
    logits = logits_of(model.params, *padded, graphdef=model.graphdef)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    return sum(log_probs[i - 1, ids[i]] for i in range(own, len(ids)))


@pytest.mark.parametrize("lags", [(), ((1,), ())])
def test_scores_are_those_of_a_document_that_begins_so(lags):
    """At its positions, which a decoder with absolute ones needs."""
    model = make(lags=lags)
    prompts, candidates = ["red apple", "a"], [" on blue", " with", "é"]
    found = model.score(prompts, candidates, prefix="a tree ")
    wanted = [[expected(model, "a tree " + p, c) for c in candidates] for p in prompts]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_text_alone_follows_the_documents_begin(model):
    assert np.isfinite(model.score([""], ["red", "a"])).all()


def test_a_vocabulary_that_folds_case_scores_without_it():
    """A folded character may be two, so a candidate's beginning is counted in the text as given."""
    model = make(folds_case=True)
    pairs = model.score(["STRASSE ", "straße "], ["WITH", "with"])
    np.testing.assert_allclose(pairs, np.broadcast_to(pairs[0, 0], (2, 2)), atol=1e-5)
    np.testing.assert_allclose(pairs[0, 0], expected(model, "strasse ", "with"), atol=1e-4)


def test_it_writes_text_only_up_to_its_end(model):
    made = model.generate(["red", "a tree"], num_tokens=6)
    ours = model.generator.vocabulary
    assert len(made.tokens) == 2 and all(len(ids) <= 6 for ids in made.tokens)
    assert all(token < ours.text_size for ids in made.tokens for token in ids)
    assert made.texts == [ours.decode_text(ids) for ids in made.tokens]


def test_its_vocabulary_is_that_of_text(model):
    words, ours = model.vocabulary, model.generator.vocabulary
    assert len(words) == ours.size + 5 and "" not in words[32:127]
    assert set(words[ours.text_size :]) == {""}


def test_a_text_longer_than_the_positions_is_refused(model):
    with pytest.raises(UserError, match="reads at most"):
        model.score(["xyz" * 30], ["a"])
    with pytest.raises(UserError, match="exceed the model's maximum"):
        model.generate(["xyz" * 30])
