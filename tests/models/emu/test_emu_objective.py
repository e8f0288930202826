"""Emu's loss: what counts by hand, where gradients go, and one device against eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_emu
from flax import nnx

from rag_mm.core import image_slots, sharding
from rag_mm.core.roles import IGNORED, MAIN, RETRIEVED
from rag_mm.models.emu import emu_objective, image_codes
from rag_mm.nn import param_trees

PAPER = tiny_emu.PAPER


def test_supervised_targets_and_pairs_of_a_written_sequence():
    """`<s> a [IMG] x x x [/IMG] b [IMG] x x x [/IMG] </s> [PAD]`."""
    row = image_slots.interleave([[5], None, [6], None], PAPER.ids, 3, has_end=True)
    batch = tiny_emu.make_batch(PAPER, [row], length=len(row.tokens) + 1)
    targets, slot = jnp.asarray(batch["targets"]), jnp.asarray(batch["slot"])
    is_text = emu_objective.text_targets(targets, PAPER)
    assert np.flatnonzero(is_text[0]).tolist() == [0, 6, 12]  # a, b and </s>
    is_slot, is_end = emu_objective.image_pairs(slot, targets, PAPER)
    assert np.flatnonzero(is_slot[0]).tolist() == [2, 3, 4, 8, 9, 10]
    assert np.flatnonzero(is_end[0]).tolist() == [5, 11]  # N + 1 = 4 pairs an image
    assert not emu_objective.image_pairs(slot, targets, tiny_emu.PCA)[1].any()


def written_loss(model, batch):
    """Cross-entropy, squared error and their counts, position by position; targets are constants."""
    c, n = model.config, model.config.num_slots
    shape = batch["image_tokens"].shape
    codes = model.encode(jnp.asarray(batch["image_tokens"]).reshape(-1, *shape[2:]))
    codes = codes.reshape(*shape[:2], n, -1)
    tokens, slot = batch["tokens"], batch["slot"]
    words = model.decoder.input_vectors(jnp.asarray(tokens))
    x = jnp.stack(
        [
            jnp.stack(
                [
                    codes[b, slot[b, t] // n, slot[b, t] % n] if slot[b, t] >= 0 else words[b, t]
                    for t in range(tokens.shape[1])
                ]
            )
            for b in range(len(tokens))
        ]
    )
    aims = jax.lax.stop_gradient(x)
    hidden = model.decoder(x, batch["positions"], batch["segment_ids"])
    log_probs = jax.nn.log_softmax(model.decoder.logits(hidden))
    text, image = [], []
    for b in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            here, following = tokens[b, t], tokens[b, t + 1]
            if here in (c.ids.image, c.ids.slot):
                found = hidden[b, t] @ model.regression.kernel[...]
                image.append(jnp.mean((found - aims[b, t + 1]) ** 2))
            if following not in (c.ids.pad, c.ids.image, c.ids.slot, c.ids.end_image):
                text.append(-log_probs[b, t, following])
    return sum(text) / len(text), sum(image) / len(image), len(text), len(image)


@pytest.fixture(scope="module")
def written():
    """Our loss and its gradient on the rows of `written_rows`, and those of `written_loss`."""
    config, (graphdef, params) = PAPER, tiny_emu.split("paper")
    batch = tiny_emu.make_batch(config, tiny_emu.written_rows(config))
    (loss, metrics), grads = tiny_emu.compiled("paper")(params, batch)

    def total(params):
        text, image, *counts = written_loss(nnx.merge(graphdef, params), batch)
        return text + config.image_loss_weight * image, (text, image, counts)

    (expected, parts), right = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return (loss, metrics, grads), (expected, parts, right)


def test_the_loss_is_the_written_one(written):
    (loss, metrics, _), (expected, (text, image, counts), _) = written
    assert counts == [3 + 2 + 4 + 3, 4 * 4]
    for name, value, count in (("text_ce", text, counts[0]), ("image_mse", image, counts[1])):
        assert float(metrics[name][1]) == count
        assert float(metrics[name][0]) / count == pytest.approx(float(value), rel=1e-5)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(image) > 0.1  # The regression is a real part of the loss.


def test_no_gradient_passes_through_targets_but_the_cformer_learns(written):
    """Gradients are those of a loss whose targets are constants, and reach all of the C-Former."""
    (_, _, grads), (_, _, right) = written
    for path, found in param_trees.leaves_by_path(grads).items():
        expected = param_trees.leaves_by_path(right)[path]
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=path)
    for path, leaf in param_trees.leaves_by_path(grads["cformer"]).items():
        assert np.abs(leaf).max() > 0, path
    assert np.abs(grads["regression"]["kernel"]).max() > 0


def test_end_of_image_has_no_gradient_as_a_target():
    """Where nothing follows `[/IMG]`, its embedding is only a target."""
    _, params = tiny_emu.split("paper")
    row = image_slots.interleave([[5], None], PAPER.ids, PAPER.num_slots)
    _, grads = tiny_emu.compiled("paper")(params, tiny_emu.make_batch(PAPER, [row], 1))
    table = np.asarray(grads["decoder"]["embedding"]["table"])
    assert not table[PAPER.ids.end_image].any() and table[PAPER.ids.image].any()


def test_roles_weight_text_and_images():
    """A retrieved document at weight 0 leaves the loss of the rest; ignored targets count nowhere."""
    config = dataclasses.replace(PAPER, retrieved_weight=0.0)
    params, graphdef = tiny_emu.split("paper")[1], nnx.graphdef(tiny_emu.make_model(config))
    batch = tiny_emu.make_batch(config, tiny_emu.written_rows(config)[2:3])
    roles = np.full(batch["tokens"].shape, MAIN, np.int8)
    roles[:, :5], roles[:, -3:] = RETRIEVED, IGNORED
    run = jax.jit(
        lambda p, b: emu_objective.loss_fn(nnx.merge(graphdef, p), b, jax.random.key(0))[1]
    )
    metrics = run(params, batch | {"roles": roles})
    assert float(metrics["text_ce"][1]) == 3 and float(metrics["image_mse"][1]) == 3


def test_the_loss_of_answers_is_the_cross_entropy_of_main_text_alone():
    """Against the decoder's own log-probabilities, position by position."""
    graphdef, params = tiny_emu.split("paper")
    batch = dict(tiny_emu.make_batch(PAPER, tiny_emu.written_rows(PAPER)[2:3]))
    tokens = batch.pop("image_tokens")
    roles = np.full(batch["tokens"].shape, IGNORED, np.int8)
    roles[:, 5:9] = MAIN

    def run(params, batch, tokens):
        model = nnx.merge(graphdef, params)
        codes = model.encode(tokens.reshape(-1, *tokens.shape[2:]))
        vectors = model.to_vectors(codes)
        mixed = model.mix(batch["tokens"], batch["slot"], vectors.reshape(1, -1, vectors.shape[-1]))
        hidden = model.decoder(mixed, batch["positions"], batch["segment_ids"])
        batch = batch | {"vectors": vectors[None], "roles": roles}
        log_probs = jax.nn.log_softmax(model.decoder.logits(hidden)[0])
        return emu_objective.answer_loss(model, batch, jax.random.key(0)), log_probs

    (loss, metrics), log_probs = jax.jit(run)(params, batch, tokens)
    is_text = np.asarray(emu_objective.text_targets(jnp.asarray(batch["targets"]), PAPER))[0]
    counted = [t for t in range(5, 9) if is_text[t]]
    wanted = -np.mean([log_probs[t, batch["targets"][0, t]] for t in counted])
    assert 0 < len(counted) < 4 and float(metrics["loss"][1]) == len(counted)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["standardised", "pca"])
def test_a_step_of_the_other_targets_lowers_the_loss(name):
    config, (_, params) = tiny_emu.CONFIGS[name], tiny_emu.split(name)
    batch = tiny_emu.make_batch(config, tiny_emu.written_rows(config))
    step = tiny_emu.compiled(name)
    (first, metrics), grads = step(params, batch)
    updates, _ = optax.sgd(0.02).update(grads, optax.sgd(0.02).init(params))
    (second, _), _ = step(optax.apply_updates(params, updates), batch)
    assert float(second) < float(first)
    fitted = param_trees.matching(
        [
            p
            for p in ("vision_statistics/*", "code_statistics/*", "components/*")
            if p[:-2] in grads
        ],
        grads,
        "x",
    )
    for path, leaf in param_trees.leaves_by_path(grads).items():
        assert np.any(leaf) != fitted(path), path
    assert ("anchor_mse" in metrics) == (name == "standardised")


def test_standardised_codes_have_batch_statistics_of_the_images_that_count():
    config, (graphdef, params) = tiny_emu.STANDARDISED, tiny_emu.split("standardised")
    rng = np.random.default_rng(0)
    shape = (6, config.vision.num_tokens, config.vision.vision.embed_dim)
    tokens, counted = rng.normal(size=shape).astype(np.float32), np.arange(6) < 4
    encode = jax.jit(lambda p, t, c: nnx.merge(graphdef, p).encode(t, c))
    codes = np.asarray(encode(params, tokens, counted))
    np.testing.assert_allclose(codes[:4].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(codes[:4].std(0), 1, atol=2e-2)
    other = tokens.copy()
    other[4:] += 1
    np.testing.assert_allclose(encode(params, other, counted)[:4], codes[:4], atol=1e-6)
    # Fitted statistics of the same images, put in, give the same codes without a batch.
    plain = params | {"code_statistics": {"mean": 0 * codes[0], "std": 1 + 0 * codes[0]}}
    stored = jax.jit(lambda p, t: nnx.merge(graphdef, p).encode(t))
    fitted = image_codes.fit_statistics(np.asarray(stored(plain, tokens[:4])))
    found = stored(params | {"code_statistics": fitted}, tokens[:4])
    np.testing.assert_allclose(found, codes[:4], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(tiny_emu.CONFIGS))
def test_eight_devices_compute_what_one_does(name):
    config, (_, params) = tiny_emu.CONFIGS[name], tiny_emu.split(name)
    batch = tiny_emu.make_batch(config, tiny_emu.written_rows(config))
    found = []
    for mesh in (sharding.make_mesh(), sharding.make_mesh(2, 2, 2)):
        graphdef, abstract = tiny_emu.describe(name, mesh)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)

        def loss(p, b, graphdef=graphdef):
            return emu_objective.loss_fn(nnx.merge(graphdef, p), b, jax.random.key(0))

        with jax.set_mesh(mesh):
            compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
            found.append(jax.device_get(compute(placed, sharding.put_batch(batch, mesh))))
    for left, right in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5, rtol=2e-5)
