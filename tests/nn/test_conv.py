"""Convolution and norm in their forms for CPUs: equal to XLA's and Flax's, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.nn import conv

LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


@pytest.mark.parametrize("size", [(8, 12), (18, 20)], ids=["small", "large"])
def test_outputs_and_gradients_are_those_of_a_plain_convolution(size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    layer = conv.conv3x3(3, 5, use_bias=False, rngs=nnx.Rngs(0))
    target = rng.normal(size=(2, *size, 5)).astype(np.float32)

    def penalty(convolve):
        """A loss of the gradient as well, as in R1's penalty."""

        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel) * target))

        def both(x, kernel):
            return loss(x, kernel) + jnp.sum(jax.grad(loss)(x, kernel) ** 2)

        return jax.jit(jax.value_and_grad(both, argnums=(0, 1)))

    def ours(x, kernel):
        graphdef, _ = nnx.split(layer, nnx.Param)
        return nnx.merge(graphdef, {"kernel": kernel})(x)

    kernel = layer.kernel[...]
    np.testing.assert_allclose(layer(x), plain(x, kernel), atol=1e-5)
    (a, grads), (b, wanted) = penalty(ours)(x, kernel), penalty(plain)(x, kernel)
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for mine, theirs in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(8, 12), (18, 20)], ids=["small", "large"])
def test_norms_and_their_gradients_are_those_of_flax(size, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * rng.normal(size=(2, *size, 12)), dtype)
    scale, bias = (jnp.asarray(rng.normal(size=12), jnp.float32) for _ in range(2))
    norms = conv.group_norm(12, rngs=nnx.Rngs(0)), nnx.GroupNorm(12, num_groups=4, rngs=nnx.Rngs(0))

    def loss(graphdef, x, scale, bias):
        with jax.numpy_dtype_promotion("standard"):
            y = nnx.merge(graphdef, {"scale": scale.astype(x.dtype), "bias": bias.astype(x.dtype)})(
                x
            )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, nnx.graphdef(norm)), (0, 1, 2), True))(
            x, scale, bias
        )
        for norm in norms
    ]
    assert results[0][0][1].dtype == results[1][0][1].dtype == dtype
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        mine, theirs = (np.asarray(v, np.float32) for v in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, atol=tolerance * np.abs(theirs).max())
