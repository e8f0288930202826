"""The adversarial losses of SPAE and MAGVIT: non-saturating, with R1's penalty and LeCAM's regularization.

Every term is a function of logits or images; `discriminator_loss` and `averages_loss` put them together as
losses of the whole model, which has the modules `discriminator` and `logit_averages` beside the tokenizer's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Key

from rag_mm.core import sharding
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.models.spae.loss_weights import LossWeights

Images = Float32[Array, "B H W 3"]
Logits = Float32[Array, " B"]
Scalar = Float32[Array, ""]
# (model, batch, rng) -> the images in 0..1, as they are augmented, and their reconstructions.
Reconstruct = Callable[[nnx.Module, Batch, Key[Array, ""]], tuple[Images, Images]]


class LogitAverages(nnx.Module):
    """Moving averages of the mean logits of real images and of reconstructions; zero at first.

    They are parameters, so that a step stays a pure function of its state. No loss that reads them has a
    gradient in them: they move by `averages_loss` alone.
    """

    def __init__(self):
        self.real = nnx.Param(jnp.zeros((), jnp.float32))
        self.fake = nnx.Param(jnp.zeros((), jnp.float32))


def generator_term(fake: Logits) -> Scalar:
    """Mean -log sigmoid(logit) of reconstructions, low where they pass for real (Goodfellow et al. 2014)."""
    return jnp.mean(jax.nn.softplus(-fake))


def discriminator_term(real: Logits, fake: Logits) -> Scalar:
    """Mean binary cross-entropy of real images plus that of reconstructions."""
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


def r1_term(judge: Callable[[Images], Logits], images: Images) -> Scalar:
    """Mean over real images of ||d logit / d image||^2 (Mescheder et al. 2018, section 4.1, without 1/2).

    Args:
        judge: images to logits, of which none depends on another image.
        images: the real images.
    """
    gradient = jax.grad(lambda x: jnp.sum(judge(x)))(images)
    return jnp.sum(gradient**2) / images.shape[0]


def lecam_term(real: Logits, fake: Logits, averages: LogitAverages) -> Scalar:
    """relu(mean real - average fake)^2 + relu(average real - mean fake)^2 (Tseng et al. 2021, section 3.2).

    Of mean logits, as in MAGVIT's code. No gradient in the averages.
    """
    above = jnp.mean(real) - jax.lax.stop_gradient(averages.fake[...])
    below = jax.lax.stop_gradient(averages.real[...]) - jnp.mean(fake)
    return jax.nn.relu(above) ** 2 + jax.nn.relu(below) ** 2


@sharding.automatic()
def discriminator_loss(
    model: nnx.Module,
    batch: Batch,
    rng: Key[Array, ""],
    *,
    reconstruct: Reconstruct,
    weights: LossWeights,
) -> tuple[Scalar, Metrics]:
    """The loss of the parameters `discriminator/*`: cross-entropy + weighted R1 + weighted LeCAM.

    Args:
        model: an image tokenizer with a `discriminator`, and with `logit_averages` if weights.lecam > 0.
        batch, rng: as for the tokenizer's own loss.
        reconstruct: see `Reconstruct`.
        weights: of the terms.

    Returns:
        The loss, and sums with weights: loss, real_logit, fake_logit, and r1 and lecam where they count.
    """
    images, fakes = jax.lax.stop_gradient(reconstruct(model, batch, rng))
    real, fake = model.discriminator(images), model.discriminator(fakes)
    loss = discriminator_term(real, fake)
    count = jnp.float32(images.shape[0])
    metrics = {"real_logit": (jnp.sum(real), count), "fake_logit": (jnp.sum(fake), count)}
    if weights.r1:
        penalty = r1_term(model.discriminator, images)
        loss += weights.r1 * penalty
        metrics["r1"] = (penalty * count, count)
    if weights.lecam:
        pull = lecam_term(real, fake, model.logit_averages)
        loss += weights.lecam * pull
        metrics["lecam"] = (pull * count, count)
    return loss, {"loss": (loss * count, count), **metrics}


@sharding.automatic()
def averages_loss(
    model: nnx.Module, batch: Batch, rng: Key[Array, ""], *, reconstruct: Reconstruct
) -> tuple[Scalar, Metrics]:
    """The loss of `logit_averages/*`: half the squared distance of each average to this batch's mean logit.

    A step of plain gradient descent with the rate 1 - decay is average <- decay * average + (1 - decay) *
    mean. Taken at the same parameters as the discriminator's loss, it has the same logits, which the compiler
    computes once.
    """
    images, fakes = jax.lax.stop_gradient(reconstruct(model, batch, rng))
    means = [jnp.mean(model.discriminator(each)) for each in (images, fakes)]
    averages = (model.logit_averages.real[...], model.logit_averages.fake[...])
    loss = sum(
        ((average - jax.lax.stop_gradient(mean)) ** 2 / 2)
        for average, mean in zip(averages, means, strict=True)
    )
    return loss, {"loss": (loss, jnp.float32(1))}
