"""SPAE's added losses: where a term's gradient points, what it reaches, what a weight of 0 leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.models import clip
from rag_mm.models.spae import added_terms, adversarial, discriminator, perceptual
from rag_mm.models.spae.loss_weights import LossWeights

SIZES = discriminator.DiscriminatorConfig(width=8, width_multipliers=(1, 2))
TOWER = clip.TowerConfig(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32)
CLIP = clip.CLIPConfig(
    image_size=16,
    patch_size=8,
    vision=TOWER,
    text=TOWER,
    vocab_size=8,
    max_text_len=4,
    end_of_text=7,
    projection_dim=8,
)


class Toy(nnx.Module):
    """A generator that shifts and scales images, with the networks of all losses."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.generator = nnx.Dict(
            scale=nnx.Param(jnp.float32(0.8)), shift=nnx.Param(jnp.float32(0.1))
        )
        self.discriminator = discriminator.Discriminator(SIZES, 16, rngs=rngs)
        self.logit_averages = adversarial.LogitAverages()
        self.perceptual = perceptual.CLIPFeatures(CLIP, rngs=rngs)


def reconstruct(model, batch, rng):
    images = batch["images"]
    return images, images * model.generator["scale"][...] + model.generator["shift"][...]


@functools.cache
def make():
    graphdef, params = nnx.split(Toy(), nnx.Param)
    images = np.random.default_rng(0).uniform(size=(4, 16, 16, 3)).astype(np.float32)
    return graphdef, nnx.to_pure_dict(params), {"images": jnp.asarray(images)}


@functools.cache
def gradient(loss, weights):
    """Of a loss of the whole model; which parts it reaches, the parts' gradients, and its metrics."""
    graphdef, params, batch = make()

    def generator(model, batch, rng):
        return added_terms.added_terms(model, *reconstruct(model, batch, rng), weights)

    judges = dict(reconstruct=reconstruct, weights=weights)
    losses = {
        "generator": generator,
        "discriminator": functools.partial(adversarial.discriminator_loss, **judges),
        "averages": functools.partial(adversarial.averages_loss, reconstruct=reconstruct),
    }
    run = lambda params: losses[loss](nnx.merge(graphdef, params), batch, jax.random.key(0))
    grads, metrics = jax.jit(jax.grad(run, has_aux=True))(params)
    reached = {
        name for name, part in grads.items() if any(leaf.any() for leaf in jax.tree.leaves(part))
    }
    return reached, grads, metrics


@pytest.mark.parametrize(
    ("loss", "weights", "part"),
    [
        ("generator", LossWeights(perceptual=0.1), "generator"),
        ("generator", LossWeights(adversarial=0.1), "generator"),
        ("discriminator", LossWeights(adversarial=0.1), "discriminator"),
        ("discriminator", LossWeights(adversarial=0.1, r1=10, lecam=1e-2), "discriminator"),
        ("averages", LossWeights(), "logit_averages"),
    ],
    ids=str,
)
def test_a_loss_reaches_its_own_part_alone(loss, weights, part):
    reached, grads, _ = gradient(loss, weights)
    assert reached == {part}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_without_weights_nothing_is_added():
    images = make()[2]["images"]
    bare = nnx.Module()  # It needs no network.
    total, metrics = added_terms.added_terms(bare, images, 0.5 * images, LossWeights())
    assert (float(total), metrics) == (0.0, {})
    assert set(gradient("discriminator", LossWeights(adversarial=1.0))[2]) == {
        *("loss", "real_logit", "fake_logit")
    }


@pytest.mark.parametrize("term", ["perceptual", "adversarial"])
def test_a_weight_scales_its_term(term):
    """Twice the weight is twice the gradient, while the metric tells the term without its weight."""
    once, twice = (gradient("generator", LossWeights(**{term: w})) for w in (0.1, 0.2))
    for a, b in zip(*(jax.tree.leaves(g[1]["generator"]) for g in (once, twice)), strict=True):
        np.testing.assert_allclose(2 * a, b, rtol=1e-5)
    assert once[2][term] == twice[2][term]


def test_the_generator_wants_higher_logits_of_reconstructions_most_where_they_are_lowest():
    slopes = jax.grad(adversarial.generator_term)(jnp.float32([-4, 0, 4]))
    assert (slopes < 0).all() and slopes[0] < slopes[1] < slopes[2]
    np.testing.assert_allclose(slopes[0], -1 / 3, atol=0.01)  # It does not saturate.


def test_the_discriminator_wants_high_logits_of_images_and_low_ones_of_reconstructions():
    logits = jnp.float32([-1, 0, 1])
    real, fake = jax.grad(adversarial.discriminator_term, argnums=(0, 1))(logits, logits)
    assert (real < 0).all() and (fake > 0).all()
    np.testing.assert_allclose(adversarial.discriminator_term(logits, -logits), 1.5464, atol=1e-3)


def test_r1_is_the_squared_slope_of_the_logit():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16, 3)), jnp.float32)
    images = make()[2]["images"]

    def penalty(weight):
        judge = lambda x: jnp.einsum("bhwc,hwc->b", x, weight)
        return adversarial.r1_term(judge, images)

    value, slope = jax.value_and_grad(penalty)(weight)
    np.testing.assert_allclose(value, jnp.sum(weight**2), rtol=1e-5)
    np.testing.assert_allclose(slope, 2 * weight, rtol=1e-5)


def test_a_step_against_r1s_gradient_flattens_the_discriminator():
    graphdef, params, batch = make()

    def penalty(part):
        model = nnx.merge(graphdef, params | {"discriminator": part})
        return adversarial.r1_term(model.discriminator, batch["images"])

    step = jax.jit(jax.value_and_grad(penalty))
    value, slope = step(params["discriminator"])
    after = jax.tree.map(lambda p, g: p - 1e-3 * g, params["discriminator"], slope)
    assert 0 < float(step(after)[0]) < float(value)


@pytest.mark.parametrize(
    ("real", "fake", "real_slope", "fake_slope"),
    [(1.0, -1.0, 1, -1), (-3.0, 3.0, 0, 0)],
    ids=["apart", "crossed"],
)
def test_lecam_pulls_logits_towards_the_averages_of_the_other_kind(
    real, fake, real_slope, fake_slope
):
    averages = adversarial.LogitAverages()
    averages.real[...], averages.fake[...] = jnp.float32(0.5), jnp.float32(-0.5)
    term = lambda *logits: adversarial.lecam_term(*logits, averages)
    logits = [jnp.full(2, value, jnp.float32) for value in (real, fake)]
    slopes = jax.grad(term, argnums=(0, 1))(*logits)
    assert [np.sign(slope).tolist() for slope in slopes] == [[real_slope] * 2, [fake_slope] * 2]


def test_logits_do_not_depend_on_the_batch():
    graphdef, params, batch = make()
    judge = jax.jit(lambda params, x: nnx.merge(graphdef, params).discriminator(x))
    together = judge(params, batch["images"])
    assert together.shape == (4,)
    alone = jnp.concatenate([judge(params, image[None]) for image in batch["images"]])
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_the_perceptual_distance_is_zero_for_equal_images_and_falls_along_its_gradient():
    graphdef, params, batch = make()
    images = batch["images"]

    @jax.jit
    def distance(reconstruction):
        tower = nnx.merge(graphdef, params).perceptual
        return perceptual.perceptual_term(tower, images, reconstruction)

    assert float(distance(images)) == pytest.approx(0, abs=1e-9)
    other = images[::-1]
    value, slope = jax.value_and_grad(distance)(other)
    assert 0 < float(distance(other - 0.1 * slope / jnp.abs(slope).max())) < float(value) < 4
    assert np.isfinite(jax.grad(distance)(images)).all()


def test_a_clip_compares_images_of_any_size():
    graphdef, params, batch = make()
    merge = lambda params: nnx.merge(graphdef, params).perceptual
    features = jax.jit(lambda params, x: merge(params).features(x))
    images = batch["images"]
    large = jnp.repeat(jnp.repeat(images, 2, 1), 2, 2)
    assert [layer.shape for layer in features(params, large)] == [(4, 5, 16)] * 2
    tokens = jax.jit(lambda params, x: merge(params).vision.tokens(x))(params, images)
    np.testing.assert_allclose(tokens, features(params, images)[-1], atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="give adversarial more than 0"):
        LossWeights(lecam=1e-4)
    with pytest.raises(ValueError, match="perceptual is -1"):
        LossWeights(perceptual=-1)
    with pytest.raises(UserError, match="multiple of 32 pixels, not 48"):
        discriminator.DiscriminatorConfig().final_size(48)
    tower = jax.eval_shape(lambda: perceptual.VGG16(rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="multiple of 16 pixels, not 24 x 24"):
        tower.features(jnp.zeros((1, 24, 24, 3)))
