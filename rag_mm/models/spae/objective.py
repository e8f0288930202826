"""SPAE's training loss without its GAN and semantic terms, its PSNR, and its k-means initialization."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key, UInt8

from rag_mm.core import code_grids, sharding
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.models.spae.autoencoder import SPAE
from rag_mm.ops import images as image_ops
from rag_mm.ops import quantize


@sharding.automatic()
def loss_fn(model: SPAE, batch: Batch, rng: Key[Array, ""]) -> tuple[Float32[Array, ""], Metrics]:
    """Pixel error + codebook loss + weighted commitment loss.

    Args:
      model: the image tokenizer.
      batch: `images` uint8 [B, H, W, 3].
      rng: for the flips and rotations of config.random_flip_rotate; otherwise unused.

    Returns:
      The loss, and metrics as sums with weights. `squared_error` sums over all pixels and channels,
      for `psnr`; `code_frequencies` counts the uses of each code at each level, float32
      [levels, codebook_size].
    """
    config = model.config
    images = image_ops.to_float(batch["images"])
    grids = config.grids_at(*images.shape[1:3])
    if config.random_flip_rotate:
        images = image_ops.random_flip_rotate(images, rng)
    z = model.embed(images)
    codebook = model.codebook[...]
    codes = quantize.quantize(z, codebook, grids)
    averages = quantize.running_averages(codes, codebook, grids)
    reconstruction = model.render(quantize.straight_through(z, averages[-1], grids))
    pixel_loss = jnp.mean((reconstruction - images) ** 2)
    codebook_loss, commitment_loss = quantize.quantization_losses(z, averages, grids)
    loss = pixel_loss + codebook_loss + config.commitment_weight * commitment_loss
    weight = jnp.float32(images.shape[0])
    by_level = jnp.split(codes, code_grids.ends(grids)[:-1], axis=1)
    clipped_error = jnp.sum((jnp.clip(reconstruction, 0, 1) - images) ** 2)
    metrics = {
        "loss": (loss * weight, weight),
        "squared_error": (clipped_error, jnp.float32(images.size)),
        "codebook_loss": (codebook_loss * weight, weight),
        "commitment_loss": (commitment_loss * weight, weight),
        "code_frequencies": (
            jnp.stack([quantize.code_counts(part, config.codebook_size) for part in by_level]),
            jnp.float32(codes.size),
        ),
    }
    return loss, metrics


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of images in 0..1, from the mean squared error of all of them."""
    return float(-10 * np.log10(squared_error))


@sharding.automatic()
def init_codebook(
    model: SPAE, images: UInt8[Array, "B H W 3"], key: Key[Array, ""]
) -> Float32[Array, "C D"]:
    """Codebook of k-means centers of the images' embeddings, C = codebook_size and D = embed_dim.

    Args:
      model: the image tokenizer; only its encoder is used.
      images: with at least codebook_size grid positions in all.
      key: the result is deterministic given it.
    """
    z = jax.lax.map(
        lambda image: model.embed(image_ops.to_float(image[None]))[0],
        images,
        batch_size=image_ops.num_at_once(model.config.image_size),
    )
    points = z.reshape(-1, z.shape[-1])
    return quantize.init_kmeans(points, model.config.codebook_size, key)
