"""Convolutions and a decoder in one program on one mesh, with a gradient through both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from rag_mm.core import sharding
from rag_mm.models import vqgan
from rag_mm.models.spae import autoencoder, objective, spae_config
from rag_mm.nn import conv, decoder, param_trees
from rag_mm.nn.block import Context

DECODER = decoder.DecoderConfig(32, 1, 16, 2, 16, 8, context_dim=8)
RNG = np.random.default_rng(0)
BATCH = {
    "images": RNG.random((8, 4, 4, 3)).astype(np.float32),
    "tokens": RNG.integers(32, size=(8, 5)).astype(np.int32),
    "is_vector": np.tile([True, False, False, True, False], (8, 1)),
}


class Seeing(nnx.Module):
    """A convolution's map of an image is the context, and its mean a vector among the tokens."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.block = conv.ResBlock(3, 8, rngs=rngs)
        self.to_vector = nnx.Linear(8, 16, rngs=rngs)
        self.decoder = decoder.Decoder(DECODER, rngs=rngs)

    @sharding.automatic("batch")
    def see(self, images):
        features = self.block(images)
        return self.to_vector(features.mean(axis=(1, 2))), features.reshape(len(images), -1, 8)


def make_model():
    return Seeing(rngs=nnx.Rngs(params=0))


def loss(model, batch):
    vector, features = model.see(batch["images"])
    vectors = jnp.repeat(vector[:, None], 5, axis=1)
    inputs = decoder.Mixture(batch["tokens"], vectors, batch["is_vector"])
    positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (8, 5))
    hidden = model.decoder(inputs, positions, None, Context(features))
    return jax.nn.logsumexp(model.decoder.logits(hidden), axis=-1).mean()


def value_and_grad(mesh):
    graphdef, abstract = param_trees.describe(make_model, mesh)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), start(), abstract)
    compute = jax.jit(jax.value_and_grad(lambda p, b: loss(nnx.merge(graphdef, p), b)))
    with jax.set_mesh(mesh):
        return jax.device_get(compute(params, sharding.put_batch(BATCH, mesh)))


@functools.cache
def start():
    return jax.device_get(param_trees.init_params(make_model, sharding.make_mesh()))


@pytest.mark.slow
def test_a_gradient_through_both_on_eight_devices_is_that_of_one():
    value, grads = value_and_grad(sharding.make_mesh(2, 2, 2))
    expected_value, expected = value_and_grad(sharding.make_mesh())
    assert value == pytest.approx(expected_value, abs=1e-5)
    for found, right in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected["block"]))


def test_inside_the_partitioner_chooses_and_outside_types_say_the_layout():
    seen = []

    @sharding.automatic("batch")
    def inner(x, *, times):
        seen.append((jax.sharding.get_abstract_mesh().axis_types, times))
        return sharding.automatic("batch")(lambda x: x.reshape(-1, 3).reshape(x.shape) * times)(x)

    @sharding.automatic()
    def total(x):
        return x.sum(), x.sum(axis=0)

    x = np.ones((8, 2, 3), np.float32)
    assert inner(x, times=2.0).sum() == 96 and seen.pop()[0] == ()
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        result = jax.jit(lambda x: (inner(x, times=2.0), *total(x)))
        placed = sharding.put_batch({"x": x}, jax.sharding.get_mesh())["x"]
        scaled, scalar, column = result(placed)
    assert seen == [((AxisType.Auto,) * 3, 2.0)]
    assert scaled.sharding.spec == PartitionSpec(("data", "fsdp"), None, None)
    assert column.sharding.spec == PartitionSpec(None, None)
    assert (float(scalar), float(scaled.sum())) == (48.0, 96.0)


@pytest.mark.slow
def test_image_tokenizers_on_eight_devices_are_those_of_one():
    """Codes and images of a VQGAN, and the loss of SPAE's autoencoder with its gradient."""
    vq = vqgan.VQGANConfig(8, 8, (1, 2), 1, (), 8, 8, 16, num_groups=4, has_decoder=True)
    spae = spae_config.SPAEConfig(
        image_size=8,
        patch_size=2,
        width=8,
        width_multipliers=(1,),
        num_res_blocks=1,
        embed_dim=8,
        codebook_size=16,
        levels=(2, 4),
        random_flip_rotate=True,
    )
    images = RNG.random((8, 8, 8, 3)).astype(np.float32)

    def both(mesh):
        made = [
            lambda: vqgan.VQGAN(vq, rngs=nnx.Rngs(0)),
            lambda: autoencoder.SPAE(spae, rngs=nnx.Rngs(0)),
        ]
        graphdefs = [param_trees.describe(make, mesh)[0] for make in made]
        params = [param_trees.init_params(make, mesh) for make in made]

        @jax.jit
        def run(params, images):
            first = nnx.merge(graphdefs[0], params[0])
            codes = first.encode(images)

            def error(params):
                model, pixels = nnx.merge(graphdefs[1], params), (255 * images).astype(jnp.uint8)
                return objective.loss_fn(model, {"images": pixels}, jax.random.key(0))[0]

            return codes, first.decode(codes), *jax.value_and_grad(error)(params[1])

        with jax.set_mesh(mesh):
            placed = sharding.put_batch({"images": images}, mesh)["images"]
            return jax.device_get(run(params, placed))

    found, expected = both(sharding.make_mesh(2, 2, 2)), both(sharding.make_mesh())
    np.testing.assert_array_equal(found[0], expected[0])
    for left, right in zip(jax.tree.leaves(found[1:]), jax.tree.leaves(expected[1:]), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
