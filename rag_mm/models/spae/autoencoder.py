"""The image tokenizer: an autoencoder around a pyramid of codes (SPAE, spec sections 2, 3, 5, 7)."""

import dataclasses
import itertools
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.nn import conv
from rag_mm.ops import quantize


@dataclasses.dataclass(frozen=True)
class SPAEConfig:
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
    random_flip_rotate: bool = False  # training images are flipped and turned at random, see ops.images

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
            random_flip_rotate=True,
        )


class PatchEncoder(nnx.Module):
    """Embeds each patch by itself, so that equal patches get equal codes wherever they stand."""

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs):
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

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs):
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


class ImageDecoder(nnx.Module):
    """The mirror of ConvEncoder, with nearest upsampling and a convolution between scales."""

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs):
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

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        make_encoder = PatchEncoder if config.encoder == "patch" else ConvEncoder
        self.encoder = make_encoder(config, rngs=rngs)
        self.decoder = ImageDecoder(config, rngs=rngs)
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
