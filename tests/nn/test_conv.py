"""The 3x3 convolution whose gradient is written for CPUs: equal to XLA's, also its second derivative."""

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
