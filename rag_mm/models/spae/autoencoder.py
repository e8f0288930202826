"""The image tokenizer: an autoencoder around a pyramid of codes (SPAE, spec sections 2, 3, 5, 7)."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.nn import conv
from rag_mm.ops import quantize

Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the tokenizer; the defaults are SPAE's image model at 128 pixels.

    The full grid has image_size / (patch_size * 2 ** (scales - 1)) positions a side, and scales =
    len(width_multipliers).
    """

    image_size: int = 128
    patch_size: int = 1  # pixels a side that are folded into channels at both ends
    encoder: Literal["conv", "patch"] = "conv"  # "patch": a code sees the pixels of its patch only
    width: int = 128
    width_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2  # at each scale and once more beside the grid of codes
    embed_dim: int = 256
    codebook_size: int = 8192
    levels: quantize.Levels = (1, 2, 4, 8, 16, 16)
    commitment_weight: float = 0.33
    is_turned: bool = False  # training images are flipped and turned at random, see turn()

    def __post_init__(self):
        quantize.check_levels(self.levels)
        for name in ("patch_size", "width", "embed_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is no size: give at least 1.")
        shrink = self.patch_size * 2 ** (len(self.width_multipliers) - 1)
        if self.image_size != shrink * self.levels[-1]:
            raise UserError(
                f"image_size={self.image_size} does not fit: patches and scales shrink it by "
                f"{shrink} and levels end in a grid of {self.levels[-1]}, so it must be "
                f"{shrink * self.levels[-1]}."
            )
        if self.encoder not in ("conv", "patch"):
            raise UserError(f"encoder={self.encoder!r} is unknown: choose conv or patch.")
        if self.encoder == "patch" and len(self.width_multipliers) > 1:
            raise UserError("encoder=patch has one scale: give one width multiplier.")

    @property
    def num_codes(self) -> int:
        """Codes of one image."""
        return quantize.num_codes(self.levels)

    @classmethod
    def tiny(cls) -> Self:
        """64 codes of 256 for 32-pixel pictures, plain VQ, trained in seconds: for tests."""
        return cls(
            image_size=32,
            patch_size=4,
            encoder="patch",
            width=16,
            width_multipliers=(1,),
            num_res_blocks=1,
            embed_dim=48,
            codebook_size=256,
            levels=(8,),
            commitment_weight=1.0,
            is_turned=True,
        )


class PatchEncoder(nnx.Module):
    """Embeds each patch by itself, so that equal patches get equal codes wherever they stand."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        patch_dim = 3 * config.patch_size**2
        self.shortcut = nnx.Linear(patch_dim, config.embed_dim, kernel_init=_init_eye, rngs=rngs)
        self.stem = nnx.Linear(patch_dim, config.width, rngs=rngs)
        self.blocks = nnx.List(
            [conv.PointwiseBlock(config.width, rngs=rngs) for _ in range(config.num_res_blocks)]
        )
        self.to_embedding = nnx.Linear(
            config.width, config.embed_dim, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(self, patches: jax.Array) -> jax.Array:
        """float32 [B, S, S, 3 * patch ** 2] -> float32 [B, S, S, embed_dim]."""
        h = self.stem(patches)
        for block in self.blocks:
            h = block(h)
        return self.shortcut(patches) + self.to_embedding(h)


class ConvEncoder(nnx.Module):
    """Residual blocks with an average pool between scales (section 2)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = [config.width * m for m in config.width_multipliers]
        self.stem = conv.conv3x3(3 * config.patch_size**2, widths[0], rngs=rngs)
        scales, previous = [], widths[0]
        for width in [*widths, widths[-1]]:  # the last scale is followed by blocks on its grid
            scales.append(_res_blocks(previous, width, config.num_res_blocks, rngs=rngs))
            previous = width
        self.scales = nnx.List(scales)
        self.norm = conv.group_norm(previous, rngs=rngs)
        self.to_embedding = nnx.Linear(previous, config.embed_dim, rngs=rngs)

    def __call__(self, patches: jax.Array) -> jax.Array:
        """float32 [B, H, W, 3 * patch ** 2] -> float32 [B, S, S, embed_dim]."""
        h = self.stem(patches)
        for index, blocks in enumerate(self.scales):
            h = blocks(h)
            if index < len(self.scales) - 2:
                h = conv.average_pool(h)
        return self.to_embedding(nnx.silu(self.norm(h)))


class Decoder(nnx.Module):
    """The mirror of ConvEncoder, with nearest upsampling and a convolution between scales."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = [config.width * m for m in reversed(config.width_multipliers)]
        self.stem = conv.conv3x3(config.embed_dim, widths[0], rngs=rngs)
        self.blocks = _res_blocks(widths[0], widths[0], config.num_res_blocks, rngs=rngs)
        scales, ups, previous = [], [], widths[0]
        for index, width in enumerate(widths):
            scales.append(_res_blocks(previous, width, config.num_res_blocks, rngs=rngs))
            if index < len(widths) - 1:
                ups.append(conv.conv3x3(width, width, rngs=rngs))
            previous = width
        self.scales, self.ups = nnx.List(scales), nnx.List(ups)
        self.norm = conv.group_norm(previous, rngs=rngs)
        patch_dim = 3 * config.patch_size**2
        self.to_patches = conv.conv3x3(previous, patch_dim, rngs=rngs)
        if config.encoder == "patch":
            self.to_patches.kernel[...] = jnp.zeros_like(self.to_patches.kernel[...])
            self.shortcut = nnx.Linear(
                config.embed_dim, patch_dim, kernel_init=_init_eye, rngs=rngs
            )
        else:
            self.shortcut = None

    def __call__(self, z: jax.Array) -> jax.Array:
        """float32 [B, S, S, embed_dim] -> float32 [B, H, W, 3 * patch ** 2]."""
        h = self.blocks(self.stem(z))
        for index, blocks in enumerate(self.scales):
            h = blocks(h)
            if index < len(self.ups):
                h = self.ups[index](conv.upsample_nearest(h))
        patches = self.to_patches(nnx.silu(self.norm(h)))
        return patches if self.shortcut is None else patches + self.shortcut(z)


class SPAE(nnx.Module):
    """Images to codes and back. Images are float32 [B, H, W, 3] in 0..1."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        make_encoder = PatchEncoder if config.encoder == "patch" else ConvEncoder
        self.encoder = make_encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        scale = nnx.initializers.normal(config.embed_dim**-0.5)
        shape = (config.codebook_size, config.embed_dim)
        self.codebook = nnx.Param(scale(rngs.params(), shape, jnp.float32))

    def embed(self, images: jax.Array) -> jax.Array:
        """What is quantised: float32 [B, S, S, embed_dim]."""
        return self.encoder(conv.space_to_depth(images, self.config.patch_size))

    def encode(self, images: jax.Array) -> jax.Array:
        """int32 [B, num_codes], level by level, in raster order inside a level."""
        return quantize.quantize(self.embed(images), self.codebook[...], self.config.levels)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Images in 0..1 from int32 [B, N] codes of all levels or of the first few."""
        averages = quantize.running_averages(codes, self.codebook[...], self.config.levels)
        return jnp.clip(self.render(averages[-1]), 0, 1)

    def render(self, z: jax.Array) -> jax.Array:
        """Images, not yet clipped, from float32 [B, S, S, embed_dim]."""
        return conv.depth_to_space(self.decoder(z), self.config.patch_size)


def _res_blocks(in_dim: int, out_dim: int, count: int, *, rngs: nnx.Rngs) -> nnx.Sequential:
    dims = [in_dim] + [out_dim] * count
    return nnx.Sequential(*[conv.ResBlock(a, b, rngs=rngs) for a, b in itertools.pairwise(dims)])


def _init_eye(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """The identity, cut or padded with zeros: so new patch embeddings are the pixels themselves."""
    del key
    return jnp.eye(*shape, dtype=dtype)


def to_float(pixels: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 0..1, of any shape."""
    return pixels.astype(jnp.float32) / 255


def to_uint8(images: jax.Array) -> jax.Array:
    """float32 -> uint8 by rounding, values outside 0..1 clipped; inverse of to_float."""
    return jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)


def turn(images: jax.Array, rng: jax.Array) -> jax.Array:
    """Each image [B, S, S, 3] in one of the eight flips and quarter turns of a square.

    On emoji scenes it is worth 0.1 dB on unseen classes; pictures of a world with an up and
    a down are better left as they are.
    """
    is_moved = jax.random.bernoulli(rng, shape=(3, images.shape[0], 1, 1, 1))
    images = jnp.where(is_moved[0], images[:, ::-1], images)
    images = jnp.where(is_moved[1], images[:, :, ::-1], images)
    return jnp.where(is_moved[2], images.swapaxes(1, 2), images)


def loss_fn(
    model: SPAE, batch: Mapping[str, jax.Array], rng: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Pixel error + codebook loss + weighted commitment (section 7 without its GAN terms).

    Args:
      batch: images uint8 [B, H, W, 3].
      rng: of the turns of config.is_turned; unused without them.

    Returns:
      The float32 loss and metrics name -> (sum, weight). `squared_error` pools over all pixels and
      channels for psnr(); `code_frequencies` has a float32 [codebook_size] vector as its sum.
    """
    config = model.config
    images = to_float(batch["images"])
    if config.is_turned:
        images = turn(images, rng)
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
    z = model.embed(to_float(images))
    points = z.reshape(-1, z.shape[-1])
    return quantize.init_kmeans(points, model.config.codebook_size, key)
