"""A tuned Emu: updates of low rank on a model that stays what it was, and marks of dialogues."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from etils import epath

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.data import vocabulary
from rag_mm.data.interleaved import Mark
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.nn import lora, param_trees
from rag_mm.stages.emu import saved_emu, tuned_emu

TEXTS = ("red apple on blue", "a dog", "user and assistant")
UPDATES = dataclasses.replace(tuned_emu.PAPER_LORA, rank=2, alpha=2.0)


def tiny_config(vocab_size=264):
    tiny = EmuConfig.tiny()
    return dataclasses.replace(
        tiny,
        decoder=dataclasses.replace(tiny.decoder, vocab_size=vocab_size, max_seq_len=96),
        ids=SlotTokens(*range(256, 262)),
        has_tower=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model in `emu`, and random updates in `emu_sft`."""
    root, config = epath.Path(tmp_path_factory.mktemp("run")), tiny_config()
    text = vocabulary.train_vocabulary(TEXTS, 256, 1, 1)
    make = functools.partial(saved_emu.make_model, config, 0)
    saved_emu.save(
        root / "emu", config, 24, text, param_trees.init_params(make, sharding.make_mesh())
    )
    make = functools.partial(tuned_emu.make_model, config, UPDATES, 0)
    params = param_trees.init_params(make, sharding.make_mesh())
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), params)
    (root / "emu_sft").mkdir()
    tuned_emu.save(root / "emu_sft", params, UPDATES, "look")
    return root


@pytest.fixture(scope="module")
def base(folder):
    return saved_emu.load(folder / "emu")


MAINS = [("a dog",), ("red apple",)]
NOTHING = np.zeros((0, 3, 16), np.float32)


def test_only_self_attention_and_the_roles_differ_and_the_base_stays(folder, base):
    nll = base.text_nll([(), ()], MAINS, NOTHING)
    before = jax.tree.map(np.array, base.model.params)
    tuned = tuned_emu.load(folder / "emu_sft", base).emu
    old, new = (param_trees.leaves_by_path(each) for each in (before, tuned.model.params))
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    maps = {f"decoder/stack/blocks/attention/{name}/kernel" for name in ("q", "k", "v", "out")}
    assert changed == maps | {"decoder/embedding/table"} and old.keys() == new.keys()
    table, was = new["decoder/embedding/table"], old["decoder/embedding/table"]
    np.testing.assert_array_equal(table[:262], was[:262])
    for mark, row in ((Mark.USER, 262), (Mark.ASSISTANT, 263)):
        words = base.vocabulary.encode_text(mark.value)
        np.testing.assert_allclose(table[row], was[words].mean(0), atol=1e-6)
    # Bit for bit, also where the tuned model has been asked.
    assert np.abs(tuned.text_nll([(), ()], MAINS, NOTHING) - nll).max() > 1e-3
    np.testing.assert_array_equal(base.text_nll([(), ()], MAINS, NOTHING), nll)
    for path, leaf in param_trees.leaves_by_path(base.model.params).items():
        np.testing.assert_array_equal(leaf, old[path])


def test_a_dialogue_is_a_prompt_of_the_tuned_model_alone(folder, base):
    tuned = tuned_emu.load(folder / "emu_sft", base)
    prompt = tuned.prompt([(("what?",), "a dog"), (("where?",), None)])
    colon = base.vocabulary.encode_text(":")
    tokens = tuned.emu.maker.prompt(prompt).tokens.tolist()
    encode = base.vocabulary.encode_text
    first = [
        256,
        *encode("look"),
        262,
        *colon,
        *encode("what?"),
        263,
        *colon,
        *encode("a dog"),
        257,
    ]
    assert tokens == [*first, 262, *colon, *encode("where?"), 263, *colon]
    assert len(tuned.emu.write([prompt], NOTHING, 3)) == 1
    with pytest.raises(UserError, match="train the stage emu_sft"):
        base.write([prompt], NOTHING, 3)


def test_a_vocabulary_without_room_for_the_roles_is_refused(base):
    with pytest.raises(UserError, match="leave none for"):
        tuned_emu.marks_of(tiny_config(263), base.vocabulary)


def test_updates_are_the_papers():
    made = param_trees.describe(
        functools.partial(tuned_emu.make_model, tiny_config(), tuned_emu.PAPER_LORA, 0), None
    )[1]
    added = param_trees.leaves_by_path(param_trees.split(made, lora.is_added)[0])
    assert {path.rpartition("/")[0] for path in added} == {
        f"decoder/stack/blocks/attention/{name}" for name in ("q", "k", "v", "out")
    }
    assert (tuned_emu.PAPER_LORA.rank, tuned_emu.PAPER_LORA.scale) == (16, 1.0)
    assert tuned_emu.PAPER_LORA.dropout == 0.05
