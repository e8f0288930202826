"""SPAE's training loss, the figures logged with it, and the k-means start of a learned codebook."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Key, UInt8

from rag_mm.core import code_grids, sharding
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.models.spae import added_terms, semantic
from rag_mm.models.spae.autoencoder import SPAE
from rag_mm.models.spae.loss_weights import LossWeights
from rag_mm.ops import images as image_ops
from rag_mm.ops import quantize

NO_SEMANTICS, NO_ADDED = semantic.SemanticConfig(), LossWeights()


class _Encoded(NamedTuple):
    """Images as they were augmented, their latents and codes, and what is decoded from these."""

    images: Float32[Array, "B H W 3"]
    z: Float32[Array, "B R S D"]
    codes: Int[Array, "B N"]
    averages: Sequence[Float32[Array, "B R S D"]]
    reconstruction: Float32[Array, "B H W 3"]


@sharding.automatic()
def loss_fn(
    model: SPAE,
    batch: Batch,
    rng: Key[Array, ""],
    *,
    semantic_config: semantic.SemanticConfig = NO_SEMANTICS,
    weights: LossWeights = NO_ADDED,
) -> tuple[Float32[Array, ""], Metrics]:
    """Pixel error + codebook loss + weighted commitment, added and semantic losses (docs/papers/spae.md).

    Args:
      model: the image tokenizer.
      batch: `images` uint8 [B, H, W, 3]; `embeddings` float32 [B, E] of a guided model; with semantic
        guidance `pool_words` int32 [B, M] and `pool_sizes` int32 [B, L], see `semantic.semantic_loss`.
      rng: for flips and rotations, and for the choice of words.
      semantic_config: weight of the semantic loss.
      weights: of the perceptual and adversarial terms, whose networks the model then has.

    Returns:
      The loss, and metrics as sums with weights. `squared_error` sums over all pixels and channels,
      for `psnr`; `code_frequencies` counts the uses of each code at each level, float32
      [levels, codebook_size]; `latent_errors` is ||z - zhat_<=l||^2 / D at the positions that have a code
      up to each level, float32 [levels], and `latent_square` ||z||^2 / D; `target_squares` is ||z_l||^2 / D
      of the vectors that each level quantizes, float32 [levels], and `codebook_square` that of the codebook.
    """
    config = model.config
    encoded = _encode(model, batch, rng)
    images, z, codes, averages, reconstruction = encoded
    grids, codebook = config.grids_at(*images.shape[1:3]), model.codebook[...]
    pixel_loss = jnp.mean((reconstruction - images) ** 2)
    codebook_loss, commitment_loss = quantize.quantization_losses(z, averages, grids)
    # A language codebook is not trained, and its part of the loss would only shift the others' balance.
    to_codebook = codebook_loss if config.codebook == "learned" else jnp.zeros_like(codebook_loss)
    loss = pixel_loss + to_codebook + config.commitment_weight * commitment_loss
    added, metrics = added_terms.added_terms(model, images, reconstruction, weights)
    loss, weight = loss + added, jnp.float32(images.shape[0])
    metrics["codebook_loss"] = (codebook_loss * weight, weight)
    metrics["commitment_loss"] = (commitment_loss * weight, weight)
    if semantic_config.alpha:
        targets = quantize.level_targets(z, codes, codebook, grids, config.is_residual)
        pools = (batch["pool_words"], batch["pool_sizes"])
        scale, key = semantic_config.logit_scale, jax.random.fold_in(rng, 1)
        semantic_loss = semantic.semantic_loss(targets, codebook, *pools, key, scale)
        factor = semantic.balance(loss, semantic_loss) if semantic_config.is_balanced else 1.0
        loss = loss + semantic_config.alpha * factor * semantic_loss
        metrics["semantic_loss"] = (semantic_loss * weight, weight)
    metrics["loss"] = (loss * weight, weight)
    return loss, metrics | _figures(model, encoded)


@sharding.automatic()
def reconstruct(
    model: SPAE, batch: Batch, rng: Key[Array, ""]
) -> tuple[Float32[Array, "B H W 3"], Float32[Array, "B H W 3"]]:
    """The images as `loss_fn` augments them with the same `rng`, and their reconstructions, not clipped."""
    encoded = _encode(model, batch, rng)
    return encoded.images, encoded.reconstruction


def quantized_points(
    model: SPAE, batch: Batch, rng: Key[Array, ""]
) -> tuple[Float32[Array, "P D"], Float32[Array, " P"]]:
    """All vectors of a batch to which a nearest code is sought, and their squared distances to it.

    Images are augmented as `loss_fn` does with the same `rng`; P is the number of codes of the batch.
    """
    config = model.config
    encoded = _encode(model, batch, rng)
    grids, codebook = config.grids_at(*encoded.images.shape[1:3]), model.codebook[...]
    targets = quantize.level_targets(encoded.z, encoded.codes, codebook, grids, config.is_residual)
    flat = [target.reshape(len(target), -1, target.shape[-1]) for target in targets]
    points = jnp.concatenate(flat, axis=1)  # In the order of the codes.
    errors = jnp.sum((points - codebook[encoded.codes]) ** 2, axis=-1)
    return points.reshape(-1, points.shape[-1]), errors.reshape(-1)


def _encode(model: SPAE, batch: Batch, rng: Key[Array, ""]) -> _Encoded:
    config = model.config
    images = image_ops.to_float(batch["images"])
    grids = config.grids_at(*images.shape[1:3])
    if config.random_flip_rotate:
        images = image_ops.random_flip_rotate(images, rng)
    z, codebook = model.embed(images, batch.get("embeddings")), model.codebook[...]
    codes = quantize.quantize(z, codebook, grids, config.is_residual)
    averages = quantize.running_averages(codes, codebook, grids, config.is_residual)
    reconstruction = model.render(quantize.straight_through(z, averages[-1], grids))
    return _Encoded(images, z, codes, averages, reconstruction)


def _figures(model: SPAE, encoded: _Encoded) -> Metrics:
    """Errors of pixels and latents, and how often each code is used, by level; see `loss_fn`."""
    images, z, codes, averages, reconstruction = encoded
    grids = model.config.grids_at(*images.shape[1:3])
    weight = jnp.float32(images.shape[0])
    by_level = jnp.split(codes, code_grids.ends(grids)[:-1], axis=1)
    errors = quantize.latent_errors(z, averages, grids)
    squares = quantize.target_squares(z, averages, grids, model.config.is_residual)
    counts = jnp.stack(
        [quantize.code_counts(part, model.config.codebook_size) for part in by_level]
    )
    clipped_error = jnp.sum((jnp.clip(reconstruction, 0, 1) - images) ** 2)
    return {
        "squared_error": (clipped_error, jnp.float32(images.size)),
        "code_frequencies": (counts, jnp.float32(codes.size)),
        "latent_errors": (errors * weight, weight),
        "latent_square": (jnp.mean(z**2) * weight, weight),
        "target_squares": (squares * weight, weight),
        "codebook_square": (jnp.mean(model.codebook[...] ** 2) * weight, weight),
    }


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
