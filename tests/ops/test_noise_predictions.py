"""Whatever a network predicts of a noisy image, a right prediction gives back image and noise."""

import jax.numpy as jnp
import numpy as np
import pytest

from rag_mm.ops import diffusion


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_a_right_prediction_gives_back_image_and_noise(prediction):
    rng = np.random.default_rng(0)
    images, noise = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(2))
    share = jnp.array([0.3, 0.8], jnp.float32)
    noisy = diffusion.add_noise(images, noise, share)
    aim = diffusion.target(images, noise, share, prediction)
    found = diffusion.split_noise(noisy, aim, share, prediction)
    np.testing.assert_allclose(found, (images, noise), atol=1e-5)
