"""Stories, edits and questions through sequences, packing and training steps."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from rag_mm.core import roles
from rag_mm.data import masking, packing, sequences, token_documents, vocabulary
from rag_mm.models import ra_cm3
from rag_mm.nn import decoder, param_trees
from rag_mm.worlds.emoji import emoji_scenes, scene_tasks, task_table

NAMES = ("story", "recolor", "what", "swap")
NUM_CODES = 9
VOCABULARY = vocabulary.train_vocabulary([], 256, 16, 4)
LAYOUT = sequences.Layout(
    max_docs=0,
    max_text_len=12,
    num_codes=NUM_CODES,
    max_spans=2,
    kind="packed",
    max_seq_len=256,
    num_texts=5,
    num_images=4,
)
CONFIG = ra_cm3.RACM3Config(
    decoder.DecoderConfig(VOCABULARY.size, 2, 32, 2, 64, LAYOUT.num_positions),
    VOCABULARY.code_offset,
)


def codes_of(picture):
    """A coarse look at a picture: the mean brightness of nine areas, in 16 steps."""
    side = len(picture) // 3
    areas = picture[: 3 * side, : 3 * side].reshape(3, side, 3, side, 3).mean((1, 3, 4))
    return (areas.ravel() // 16).astype(np.int32)


@pytest.fixture(scope="module")
def examples():
    """Two documents of each task, prompts as context."""
    scenes = emoji_scenes.Scenes("easy", np.arange(40), "train")
    found = []
    for name in NAMES:
        items = scene_tasks.TaskItems(task_table.TASKS[name], scenes)
        for number in (0, 5):
            document = items.document(number)
            codes = [codes_of(picture) for picture in document.pictures]
            example = token_documents.from_document(VOCABULARY, document, codes, 12)
            num_context = len(items[number].prompt) if name != "story" else 0
            segments = tuple(
                dataclasses.replace(s, role=roles.IGNORED if i < num_context else None)
                for i, s in enumerate(example.segments)
            )
            found.append(dataclasses.replace(example, segments=segments))
    return found


def make_sequence(example, rng):
    plain = sequences.lay_out(LAYOUT, VOCABULARY, example)
    segments = plain.segments[plain.is_maskable]
    spans = masking.sample_spans(masking.Masking(1), segments, rng, 2, len(plain.tokens))
    return plain, sequences.mask(LAYOUT, VOCABULARY, plain, spans)


@pytest.fixture(scope="module")
def model():
    make = lambda: decoder.Decoder(CONFIG.decoder, rngs=nnx.Rngs(params=0))
    graphdef, _ = param_trees.describe(make, None)
    return graphdef, jax.jit(lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)))()


@functools.cache
def compiled_loss(graphdef):
    def loss_fn(params, batch):
        model = nnx.merge(graphdef, params)
        return ra_cm3.loss_fn(model, batch, jax.random.key(0), config=CONFIG)

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def test_task_documents_have_the_shapes_that_they_are_named_for(examples):
    kinds = [[s.kind[0] for s in example.segments] for example in examples]
    assert any(k.count("i") >= 3 and k.count("t") >= 2 for k in kinds)  # A story.
    assert any(k.count("i") == 2 for k in kinds) and any(k.count("i") == 1 for k in kinds)


def test_masked_documents_are_restored_and_context_is_no_target(examples):
    rng = np.random.default_rng(0)
    for example in examples:
        plain, masked = make_sequence(example, rng)
        assert masking.unmask(masked.tokens, VOCABULARY).tolist() == plain.tokens.tolist()
        for segment, (start, end) in zip(example.segments, plain.segments, strict=True):
            is_target = plain.roles[start:end] != roles.IGNORED
            assert (is_target == (segment.role != roles.IGNORED)).all()


def test_a_packed_row_has_the_loss_of_its_sequences(examples, model):
    """Sequences of a row do not see each other: sums of loss and of weights add up."""
    graphdef, params = model
    rng = np.random.default_rng(1)
    rows = [sequences.as_row(VOCABULARY, make_sequence(example, rng)[1]) for example in examples]
    pad = {"tokens": VOCABULARY.pad, "targets": VOCABULARY.pad}
    packed = packing.pack(rows, 256, pad)
    assert len(packed) < len(rows)
    alone = [packing.pack([row], 256, pad)[0] for row in rows]
    sums = []
    for group in (packed, alone):
        total = np.zeros(2)
        for row in group:
            batch = {name: values[None] for name, values in row.items()}
            (_, metrics), _ = compiled_loss(graphdef)(params, batch)
            total += np.array([float(value) for value in metrics["main_nll"]])
        sums.append(total)
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)


def test_slots_and_packed_have_one_loss_where_positions_agree(model):
    """A document whose text fills its room: token by token the same."""
    graphdef, params = model
    slots = sequences.Layout(1, 3, 4, 2)
    packed = dataclasses.replace(slots, kind="packed", max_seq_len=256)
    main = token_documents.pair([1, 2, 3], np.arange(4, dtype=np.int32))
    losses = []
    for layout in (slots, packed):
        row = sequences.make_row(layout, VOCABULARY, main, [main])
        row = packing.pack([row], 256, {"tokens": VOCABULARY.pad, "targets": VOCABULARY.pad})[0]
        row["segment_ids"][slots.length :] = 0
        (loss, _), _ = compiled_loss(graphdef)(params, {k: v[None] for k, v in row.items()})
        losses.append(float(loss))
    assert losses[0] == losses[1]


def test_training_on_them_lowers_the_loss(examples, model):
    graphdef, params = model
    rng = np.random.default_rng(2)
    optimizer = optax.adam(1e-2)
    state, losses = optimizer.init(params), []
    for _ in range(12):
        rows = [sequences.as_row(VOCABULARY, make_sequence(e, rng)[1]) for e in examples[:2]]
        pad = {"tokens": VOCABULARY.pad, "targets": VOCABULARY.pad}
        batch = {k: v[None] for k, v in packing.pack(rows, 256, pad)[0].items()}
        (loss, _), grads = compiled_loss(graphdef)(params, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < losses[0] - 0.5
