"""Answers: text tokens up to the end of the span, that of each instruction whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.data import instruction_items, sequences, vocabulary
from rag_mm.data.instruction_items import CodedItem, Template
from rag_mm.decode import instruction_answers, sampler, tasks
from rag_mm.nn import decoder, param_trees

V = vocabulary.train_vocabulary([], 256, 16, 4)
LAYOUT = sequences.Layout(max_docs=1, max_text_len=12, num_codes=4, max_spans=2)
CONFIG = decoder.DecoderConfig(
    vocab_size=V.size + 8,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    mlp_dim=16,
    max_seq_len=LAYOUT.num_positions,
)
GREEDY, WARM = sampler.Sampling(0.0), sampler.Sampling(1.0)


@pytest.fixture(scope="module")
def generator():
    make_model = lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0))
    graphdef, abstract = param_trees.describe(make_model, None)
    rng = np.random.default_rng(0)
    random = lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)
    return tasks.Generator(graphdef, jax.tree.map(random, abstract), V, LAYOUT)


def asked(question, answer="x", code=1):
    item = CodedItem("what", {"question": question, "answer": answer}, np.full(4, code, np.int32))
    template = Template("{question} {answer:cut}")
    return instruction_items.instruct(V, template, item, LAYOUT.max_text_len)


def test_an_answer_depends_on_its_instruction_alone(generator):
    """Not on the true answer, which is in the item, nor on the rest of the batch."""
    batch = [asked("what?"), asked("where?", code=3), asked("who?")]
    seeds = np.arange(3, dtype=np.uint32)
    together, means = instruction_answers.generate_answers(
        generator, batch, seeds, WARM, batch_size=2
    )
    other = [asked("what?", "pear"), asked("where?", "up", code=3), asked("who?", "it")]
    again, _ = instruction_answers.generate_answers(generator, other, seeds, WARM, batch_size=4)
    assert again == together
    alone = [
        instruction_answers.generate_answers(generator, [one], seeds[i : i + 1], WARM)
        for i, one in enumerate(batch)
    ]
    assert [text for (text,), _ in alone] == together
    np.testing.assert_allclose([mean for _, (mean,) in alone], means, atol=1e-4)
    assert len(set(together)) > 1


def test_the_likeliest_answer_is_that_of_a_full_pass(generator):
    (text,), (mean,) = instruction_answers.generate_answers(
        generator, [asked("what?")], np.zeros(1, np.uint32), GREEDY
    )
    prompt = instruction_items.prompt(LAYOUT, V, asked("what?"))
    tokens, positions = list(prompt.tokens), list(prompt.positions)
    model = nnx.merge(generator.graphdef, generator.params)
    written, log_probs = [], []
    # The token after the longest answer is not written, but counts as its end does.
    while len(log_probs) <= LAYOUT.max_text_len:
        row = jnp.asarray([tokens], jnp.int32)
        hidden = model(row, jnp.asarray([positions], jnp.int32), jnp.ones_like(row))
        logits = np.asarray(model.logits(hidden))[0, -1]
        allowed = np.r_[logits[: V.text_size], logits[V.eoss]]
        best = int(allowed.argmax())
        log_probs.append(allowed.max() - np.log(np.exp(allowed).sum()))
        if best == V.text_size:
            break
        written.append(best)
        positions.append(prompt.next_position + len(written) - 1)
        tokens.append(best)
    assert text == V.decode_text(written[: LAYOUT.max_text_len]).strip()
    assert mean == pytest.approx(np.mean(log_probs), abs=1e-4)


def test_only_texts_are_answered(generator):
    drawing = instruction_items.instruct(
        V, Template("{caption}"), CodedItem("a", {"caption": "b"}, np.zeros(4, np.int32)), 12
    )
    for batch in ([], [asked("what?"), drawing]):
        with pytest.raises(ValueError, match="ask for a text"):
            instruction_answers.generate_answers(generator, batch, np.zeros(2, np.uint32), GREEDY)
