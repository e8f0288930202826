"""What a pyramid autoencoder is trained on: pixel error, codebook and commitment losses; and its start."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.models.spae.autoencoder import SPAE
from rag_mm.ops import images as image_ops
from rag_mm.ops import quantize

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def loss_fn(
    model: SPAE, batch: Mapping[str, jax.Array], rng: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Pixel error + codebook loss + weighted commitment (section 7 without its GAN terms).

    Args:
      batch: images uint8 [B, H, W, 3].
      rng: of the turns of config.random_flip_rotate; unused without them.

    Returns:
      The float32 loss and metrics name -> (sum, weight). `squared_error` pools over all pixels and
      channels for psnr(); `code_frequencies` has a float32 [codebook_size] vector as its sum.
    """
    config = model.config
    images = image_ops.to_float(batch["images"])
    if config.random_flip_rotate:
        images = image_ops.random_flip_rotate(images, rng)
    z = model.embed(images)
    codebook = model.codebook[...]
    codes = quantize.quantize(z, codebook, config.levels)
    averages = quantize.running_averages(codes, codebook, config.levels)
    reconstruction = model.render(quantize.straight_through(z, averages[-1], config.levels))
    pixel_loss = jnp.mean((reconstruction - images) ** 2)
    codebook_loss, commitment_loss = quantize.quantization_losses(z, averages, config.levels)
    loss = pixel_loss + codebook_loss + config.commitment_weight * commitment_loss
    weight = jnp.float32(images.shape[0])
    clipped_error = jnp.sum((jnp.clip(reconstruction, 0, 1) - images) ** 2)
    metrics = {
        "loss": (loss * weight, weight),
        "squared_error": (clipped_error, jnp.float32(images.size)),
        "codebook_loss": (codebook_loss * weight, weight),
        "commitment_loss": (commitment_loss * weight, weight),
        "code_frequencies": (
            quantize.code_counts(codes, config.codebook_size),
            jnp.float32(codes.size),
        ),
    }
    return loss, metrics


def psnr(squared_error: float) -> float:
    """Decibels of a mean squared error of images in 0..1, pooled over all of them."""
    return float(-10 * np.log10(squared_error))


def init_codebook(model: SPAE, images: jax.Array, key: jax.Array) -> jax.Array:
    """k-means centres of embedded patches, float32 [codebook_size, embed_dim].

    Args:
      images: uint8 [B, H, W, 3] with at least codebook_size positions in all.
      key: the result is deterministic in it.
    """
    z = model.embed(image_ops.to_float(images))
    points = z.reshape(-1, z.shape[-1])
    return quantize.init_kmeans(points, model.config.codebook_size, key)
