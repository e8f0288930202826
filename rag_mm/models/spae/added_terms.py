"""The terms that `LossWeights` adds to the image tokenizer's own loss."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32

from rag_mm.models.objective_types import Metrics
from rag_mm.models.spae import adversarial, perceptual
from rag_mm.models.spae.loss_weights import LossWeights


def added_terms(
    model: nnx.Module,
    images: Float32[Array, "B H W 3"],
    reconstruction: Float32[Array, "B H W 3"],
    weights: LossWeights,
) -> tuple[Float32[Array, ""], Metrics]:
    """Weighted perceptual + weighted adversarial term, which have a gradient in `reconstruction` alone.

    Args:
        model: has the modules `perceptual` and `discriminator`, each if its weight is above 0.
        images: in 0..1, as they are augmented.
        reconstruction: what the decoder makes of them.
        weights: of the terms.

    Returns:
        Their sum, 0 without any, and sums with weights: perceptual and adversarial where they count.
    """
    total, metrics = jnp.float32(0), Metrics()
    count = jnp.float32(images.shape[0])
    if weights.perceptual:
        distance = perceptual.perceptual_term(model.perceptual, images, reconstruction)
        total += weights.perceptual * distance
        metrics["perceptual"] = (distance * count, count)
    if weights.adversarial:
        judge = jax.lax.stop_gradient(model.discriminator)
        term = adversarial.generator_term(judge(reconstruction))
        total += weights.adversarial * term
        metrics["adversarial"] = (term * count, count)
    return total, metrics
