"""SPAE over a frozen codebook of words: guide, shortcuts and what has a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.models.spae import (
    autoencoder,
    language_table,
    networks,
    objective,
    semantic,
    spae_config,
)
from rag_mm.nn import conv
from rag_mm.ops import images as image_ops
from rag_mm.ops import quantize

WORDS = dataclasses.replace(
    spae_config.SPAEConfig.tiny(),
    image_size=16,
    width=8,
    embed_dim=6,
    codebook_size=32,
    levels=(1, 2, 4, 4),
    codebook="language",
    guide_dim=5,
    random_flip_rotate=False,
)
SHORTCUT = dataclasses.replace(
    WORDS, encoder="conv_shortcut", patch_size=2, width_multipliers=(1, 2), guide_dim=0
)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
SEMANTIC = semantic.SemanticConfig(alpha=1.0)


def _batch():
    rng = np.random.default_rng(1)
    batch = {
        "images": IMAGES,
        "embeddings": rng.normal(size=(2, 5)).astype(np.float32),
        "pool_words": rng.integers(0, 32, (2, 4)).astype(np.int32),
        "pool_sizes": np.array([[1, 2], [3, 4]], np.int32),
    }
    return jax.tree.map(jnp.asarray, batch)


def _model(config):
    return autoencoder.SPAE(config, rngs=nnx.Rngs(0))


def _grads(config, semantic_config):
    graphdef, params = nnx.split(_model(config), nnx.Param)

    @jax.jit
    def grads(params):
        model = nnx.merge(graphdef, params)
        return objective.loss_fn(
            model, _batch(), jax.random.key(0), semantic_config=semantic_config
        )[0]

    return nnx.to_pure_dict(jax.grad(grads)(params))


@pytest.mark.parametrize("config", [WORDS, SHORTCUT], ids=["guided", "shortcut"])
def test_words_have_no_gradient_and_the_rest_of_the_network_has(config):
    grads = _grads(config, SEMANTIC)
    assert not np.asarray(grads.pop("codebook")).any()
    for name in grads:
        assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads[name])), name


def test_the_guide_reaches_only_positions_of_levels_above_the_full_grid():
    model = _model(WORDS)
    model.guide.linear.bias[...] = jnp.ones(6)
    images = image_ops.to_float(jnp.asarray(IMAGES))
    added = model.embed(images, jnp.zeros((2, 5))) - model.encoder(
        conv.space_to_depth(images, WORDS.patch_size)
    )
    counts = quantize.word_counts(WORDS.grids_at(16, 16))[-1]
    np.testing.assert_allclose(added[0, :, :, 0], counts > 2, atol=1e-6)
    with pytest.raises(ValueError, match="give the retriever's embeddings"):
        model.embed(images)


def test_the_semantic_loss_changes_the_encoder_not_the_decoder():
    plain, guided = (_grads(WORDS, config) for config in (semantic.SemanticConfig(), SEMANTIC))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        plain["decoder"],
        guided["decoder"],
    )
    assert not np.allclose(
        plain["encoder"]["shortcut"]["kernel"], guided["encoder"]["shortcut"]["kernel"]
    )


@pytest.mark.parametrize("config", [WORDS, SHORTCUT], ids=["patch", "conv_shortcut"])
def test_matched_shortcuts_give_back_images_before_quantization(config):
    """With as many dimensions as a patch has values nothing is lost."""
    config = dataclasses.replace(config, guide_dim=0, embed_dim=48, codebook_size=64)
    images = jnp.asarray(np.random.default_rng(2).random((64, 16, 16, 3)), jnp.float32)
    patches = np.asarray(networks.code_patches(images, config)).reshape(-1, 48)
    rows = np.random.default_rng(0).normal(size=(64, 60))
    table = language_table.principal(rows, 48, is_whitened=True, is_unit=False)
    into, back = language_table.matched_shortcuts(patches, table)
    model = _model(config)
    for module, values in ((model.encoder.shortcut, into), (model.decoder.shortcut, back)):
        for name in ("kernel", "bias"):
            getattr(module, name)[...] = jnp.asarray(values[name])
    z = model.embed(images)
    np.testing.assert_allclose(model.render(z), images, atol=1e-3)
    np.testing.assert_allclose(z.std(axis=(0, 1, 2)), table.std(axis=0), rtol=1e-3)


def test_residual_quantization_decodes_the_sum_of_its_words():
    config = dataclasses.replace(WORDS, guide_dim=0, quantizer="residual")
    model, images = _model(config), image_ops.to_float(jnp.asarray(IMAGES))
    codes = model.encode(images)
    z = quantize.running_averages(codes, model.codebook[...], config.grids_at(16, 16), True)[-1]
    np.testing.assert_allclose(model.decode(codes), jnp.clip(model.render(z), 0, 1), atol=1e-6)
    average = dataclasses.replace(config, quantizer="average")
    assert (np.asarray(_model(average).encode(images)) != np.asarray(codes)).any()
