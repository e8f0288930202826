"""A saved Emu: the same after loading, and its calls do not depend on what else is asked with them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.data import vocabulary
from rag_mm.models.emu.emu_config import EmuConfig, TargetsConfig
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import Mixture
from rag_mm.stages.emu import saved_emu

TEXTS = ("red apple on blue", "a dog", "the red dog moves")


@pytest.fixture(scope="module")
def emu(tmp_path_factory):
    """An untrained tiny model with the bytes as its text ids."""
    folder = epath.Path(tmp_path_factory.mktemp("emu"))
    text = vocabulary.train_vocabulary(TEXTS, 256, 1, 1)
    tiny = EmuConfig.tiny()
    config = dataclasses.replace(
        tiny,
        decoder=dataclasses.replace(tiny.decoder, vocab_size=262, max_seq_len=96),
        ids=SlotTokens(*range(256, 262)),
        has_tower=False,
        targets=TargetsConfig("standardised", anchor_weight=0.5),
    )
    make = functools.partial(saved_emu.make_model, config, 0)
    params = param_trees.init_params(make, sharding.make_mesh())
    saved_emu.save(folder, config, 24, text, params)
    return saved_emu.load(folder)


@pytest.fixture(scope="module")
def vectors(emu):
    c = emu.config
    shape = (3, c.vision.num_tokens, c.vision.vision.embed_dim)
    tokens = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    codes = emu.codes(tokens)
    assert codes.shape == (3, c.num_slots, c.decoder.embed_dim)
    return emu.vectors(codes)


PROMPTS = [("a dog",), (0, "red apple on blue", 1), (2,), ("a", 1, "b", 0, "c")]


def test_rollouts_and_texts_do_not_depend_on_the_other_prompts(emu, vectors):
    whole = emu.roll_out(PROMPTS, vectors)
    texts = emu.write(PROMPTS, vectors, 6)
    for i, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(emu.roll_out([prompt], vectors)[0], whole[i], atol=1e-5)
        assert emu.write([prompt], vectors, 6) == [texts[i]]


def test_the_likelihood_of_a_text_is_that_of_its_tokens_one_by_one(emu, vectors):
    """Against the decoder run on the sequence, position by position."""
    before, main = ("a", 0), (1, "dog")
    nll = emu.text_nll([before, ()], [main, ("a dog",)], vectors)[0]
    row = emu.maker.row(before, main)
    whole = nnx.merge(emu.model.graphdef, emu.model.params)
    is_slot = row["tokens"] == emu.config.ids.slot
    placed = np.zeros((1, len(is_slot), vectors.shape[-1]), np.float32)
    placed[0, is_slot] = vectors[[0, 1]].reshape(-1, vectors.shape[-1])
    inputs = Mixture(row["tokens"][None], placed, is_slot[None])
    hidden = whole.decoder(inputs, row["positions"][None], row["segment_ids"][None])
    log_probs = jax.nn.log_softmax(whole.decoder.logits(hidden)[0])
    # `dog` and the end of the sequence are the last four targets.
    wanted = row["targets"][-5:-1]
    assert wanted.tolist() == [*emu.maker.text("dog"), emu.config.ids.end]
    own = [log_probs[len(is_slot) - 5 + i, target] for i, target in enumerate(wanted)]
    assert nll == pytest.approx(-float(np.mean(own)), rel=1e-5)


def test_a_search_with_many_beams_finds_no_worse_a_text_than_greedy(emu, vectors):
    found = emu.search(PROMPTS[1], vectors, 3, 8)
    assert len(found) == 8 and len(set(found)) > 1


def test_a_prompt_that_is_too_long_is_refused(emu, vectors):
    with pytest.raises(UserError, match="but the model takes at most 96"):
        emu.write([("abcdefghijklmnopqrstuvwx",) * 4], vectors, 4)


def test_a_model_with_another_vocabulary_is_refused(emu, tmp_path):
    folder = epath.Path(tmp_path)
    large = vocabulary.train_vocabulary(TEXTS * 4, 270, 1, 1)
    saved_emu.save(folder, emu.config, 24, large, emu.model.params)
    with pytest.raises(UserError, match="vocabulary of another model"):
        saved_emu.load(folder)
