"""Emu's parts: which queries see which, the towers, fitted codes, sizes of the presets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_emu
from flax import nnx

from rag_mm.models import clip
from rag_mm.models.emu import cformer, emu_config, emu_model, emu_vision, image_codes
from rag_mm.nn import param_trees

CFORMER = emu_config.CFormerConfig(5, 2, 16, 2, 8, 24, num_buckets=8, max_distance=16)
RNG = np.random.default_rng(0)


def run_stack(config, queries, tokens):
    made = cformer.CFormer(config, 12, 10, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(made)
    run = jax.jit(lambda p, x, t: nnx.merge(graphdef, p).stack(x, t))
    return lambda x, t: np.asarray(run(params, x, t)), queries, tokens


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_vector_depends_on_earlier_queries_and_on_the_whole_image(is_causal):
    config = dataclasses.replace(CFORMER, is_causal=is_causal)
    queries = RNG.normal(size=(1, 5, 16)).astype(np.float32)
    tokens = RNG.normal(size=(1, 7, 12)).astype(np.float32)
    run, *_ = run_stack(config, queries, tokens)
    before = run(queries, tokens)
    moves = lambda after: (np.abs(after - before)[0].max(1) > 1e-6).tolist()
    for j in range(5):
        other = queries.copy()
        other[0, j] += RNG.normal(size=16)
        assert moves(run(other, tokens)) == [not is_causal or i >= j for i in range(5)]
    other = tokens.copy()
    other[0, -1] += RNG.normal(size=12)
    assert all(moves(run(queries, other)))


def test_the_decoder_is_causal_across_images_of_a_row():
    """Another second image changes no hidden state before its first slot."""
    config, (graphdef, params) = tiny_emu.PAPER, tiny_emu.split("paper")
    batch = tiny_emu.make_batch(config, tiny_emu.written_rows(config)[2:3])

    @jax.jit
    def hidden(params, image_tokens):
        emu = nnx.merge(graphdef, params)
        vectors = emu.to_vectors(emu.encode(image_tokens[0])).reshape(1, -1, 16)
        inputs = emu.mix(batch["tokens"], batch["slot"], vectors)
        return emu.decoder(inputs, batch["positions"], None)

    other = batch["image_tokens"].copy()
    other[0, 1] += RNG.normal(size=other[0, 1].shape)
    before, after = (hidden(params, each) for each in (batch["image_tokens"], other))
    moved = np.abs(before - after)[0].max(1) > 1e-6
    first = int(np.flatnonzero(batch["slot"][0] == config.num_slots)[0])
    assert not moved[:first].any() and moved[first:].all()


def test_the_miniatures_tower_is_a_clips():
    tower = clip.TowerConfig(16, 2, 2, 32)
    config = clip.CLIPConfig(8, 4, tower, tower, 10, 4, 9, 6)
    theirs = clip.VisionTower(config, rngs=nnx.Rngs(0))
    settings = emu_config.VisionConfig.of_clip(config)
    how = dict(dtype="float32", remat="none")
    ours = emu_vision.make_tower(settings, rngs=nnx.Rngs(1), **how)
    graphdef, own = nnx.split(ours)
    given = nnx.to_pure_dict(nnx.state(theirs))
    del given["post_norm"]
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, nnx.to_pure_dict(own))
    images = jnp.asarray(RNG.random((2, 8, 8, 3)), jnp.float32)
    np.testing.assert_array_equal(nnx.merge(graphdef, given).tokens(images), theirs.tokens(images))
    assert settings.num_tokens == 5


def test_the_sizes_of_eva_and_of_the_presets():
    """Abstract: EVA-CLIP g/14 has 257 tokens and 1,012.59 million parameters, its last norm and head too."""
    how = dict(dtype="float32", remat="none")
    settings = emu_config.VisionConfig()
    made = jax.eval_shape(lambda: emu_vision.make_tower(settings, rngs=nnx.Rngs(0), **how))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tokens = jax.eval_shape(lambda tower, x: tower.tokens(x), made, images)
    assert tokens.shape == (1, 257, 1408)
    leaves = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert leaves(made) + 2 * 1408 + 1409 * 1024 == 1_012_588_928
    counts = {}
    for name in ("tiny", "b7", "b14"):
        config = getattr(emu_config.EmuConfig, name)()
        _, params = param_trees.describe(lambda c=config: emu_model.Emu(c, rngs=nnx.Rngs(0)), None)
        counts[name] = {part: leaves(tree) for part, tree in params.items()}
    assert counts["b14"]["cformer"] == 129_033_344
    assert counts["b14"]["regression"] == 5120**2
    assert sum(counts["b14"].values()) == 14_182_299_136
    assert sum(counts["b7"].values()) == 7_894_617_600


def test_components_keep_what_differs_between_images():
    """Images that differ in one direction a group have one component; the class token has its own group."""
    directions = RNG.normal(size=(5, 24)).astype(np.float32)
    amounts = RNG.normal(size=(50, 5)).astype(np.float32)
    groups = amounts[:, :, None] * directions + 3
    tokens = np.zeros((50, 17, 6), np.float32)
    tokens[:, 0] = groups[:, 0, :6]
    squares = groups[:, 1:].reshape(50, 2, 2, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5)
    tokens[:, 1:] = squares.reshape(50, 16, 6)
    fitted = image_codes.fit_components(tokens, 3, has_class_slot=True)
    components = image_codes.Components(5, 24, 3, has_class_slot=True)
    graphdef, _ = nnx.split(components)
    codes = np.asarray(nnx.merge(graphdef, jax.tree.map(jnp.asarray, fitted))(jnp.asarray(tokens)))
    assert codes.shape == (50, 5, 3)
    np.testing.assert_allclose(codes.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(codes.var(0).mean(-1), 1, atol=1e-3)
    assert (codes[..., 1:].var(0) < 1e-6).all()
    correlation = [abs(np.corrcoef(codes[:, k, 0], amounts[:, k])[0, 1]) for k in range(5)]
    assert min(correlation) > 0.999


def test_spread_counts_the_directions_of_the_images_that_count():
    codes = np.zeros((40, 2, 8), np.float32)
    codes[:30, 0, :3] = RNG.normal(size=(30, 3))
    codes[30:] = 100
    variance, ratio = image_codes.spread(jnp.asarray(codes), jnp.arange(40) < 30)
    assert float(variance) == pytest.approx(codes[:30].var(0).mean(), rel=1e-5)
    assert 2.5 < float(ratio) <= 3
