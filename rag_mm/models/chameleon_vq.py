"""Chameleon's image tokenizer: the VQGAN of Make-A-Scene (Gafni et al. 2022; Esser et al. 2021, section 3).

Unlike SPAE (`models.spae`), convolutions have biases, downsampling is by strided convolutions padded at the
bottom and right, and there is self-attention on the smallest grid.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rag_mm.nn import conv
from rag_mm.ops import quantize

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class ChameleonVQConfig:
    """Sizes of the image tokenizer; the defaults are Chameleon's: 512 pixels to 32x32 codes."""

    image_size: int = 512
    width: int = 128
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_sizes: tuple[int, ...] = ()  # grid sides at which attention follows each block
    latent_dim: int = 256
    embed_dim: int = 256
    codebook_size: int = 8192
    num_groups: int = 32
    # The network's input is gain * x - 1 for pixels x in 0..1. Public preprocessing: 255 * 0.0078, not 2.
    gain: float = 1.989
    has_decoder: bool = False  # the public checkpoints have none

    @property
    def num_codes(self) -> int:
        """Codes per image."""
        return (self.image_size // 2 ** (len(self.width_multipliers) - 1)) ** 2


class SpatialAttention(nnx.Module):
    """Single-head self-attention over all positions of a grid, with a residual connection."""

    def __init__(self, config: ChameleonVQConfig, width: int, *, rngs: nnx.Rngs):
        self.norm = _norm(config, width, rngs=rngs)
        self.q, self.k, self.v, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        """Attends over the grid."""
        h = self.norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        attended = jax.nn.dot_product_attention(self.q(h), self.k(h), self.v(h))
        return x + self.out(attended.reshape(x.shape))


class Scale(nnx.Module):
    """The blocks of one grid, and the convolution `change` that leads to the next grid."""

    def __init__(
        self,
        blocks: list[conv.ResBlock],
        attentions: list[SpatialAttention],
        change: nnx.Conv | None,
    ):
        self.blocks, self.attentions = nnx.List(blocks), nnx.List(attentions)
        self.change = change

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W out_dim"]:
        """Applies the blocks; the caller applies `change`."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[index](x)
        return x


class Middle(nnx.Module):
    """Block, attention, block on the code grid."""

    def __init__(self, config: ChameleonVQConfig, width: int, *, rngs: nnx.Rngs):
        self.block1 = _res_block(config, width, width, rngs=rngs)
        self.attention = SpatialAttention(config, width, rngs=rngs)
        self.block2 = _res_block(config, width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B S S D"]) -> Float[Array, "B S S D"]:
        """Applies all three."""
        return self.block2(self.attention(self.block1(x)))


class VQEncoder(nnx.Module):
    """Images to latents."""

    def __init__(self, config: ChameleonVQConfig, *, rngs: nnx.Rngs):
        c, widths = config, [config.width * m for m in config.width_multipliers]
        self.stem = conv.conv3x3(3, c.width, rngs=rngs)
        scales, previous = [], c.width
        for index, width in enumerate(widths):
            is_last = index == len(widths) - 1
            side = c.image_size // 2**index
            blocks, attentions = _blocks(c, previous, width, c.num_res_blocks, side, rngs=rngs)
            # Padded at the bottom and right only.
            change = (
                None
                if is_last
                else nnx.Conv(width, width, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs)
            )
            scales.append(Scale(blocks, attentions, change))
            previous = width
        self.scales = nnx.List(scales)
        self.middle = Middle(c, previous, rngs=rngs)
        self.norm = _norm(c, previous, rngs=rngs)
        self.to_latent = conv.conv3x3(previous, c.latent_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B S S D"]:
        """Latents of scaled pixels; D is latent_dim."""
        x = self.stem(x)
        for scale in self.scales:
            x = scale(x)
            if scale.change is not None:
                x = scale.change(x)
        return self.to_latent(nnx.silu(self.norm(self.middle(x))))


class VQDecoder(nnx.Module):
    """Latents to images: mirrors VQEncoder, with one more block per grid; `scales` go from small to large."""

    def __init__(self, config: ChameleonVQConfig, *, rngs: nnx.Rngs):
        c = config
        widths = [c.width * m for m in reversed(c.width_multipliers)]
        previous = widths[0]
        self.stem = conv.conv3x3(c.latent_dim, previous, rngs=rngs)
        self.middle = Middle(c, previous, rngs=rngs)
        scales = []
        for index, width in enumerate(widths):
            is_last = index == len(widths) - 1
            side = c.image_size // 2 ** (len(widths) - 1 - index)
            blocks, attentions = _blocks(c, previous, width, c.num_res_blocks + 1, side, rngs=rngs)
            change = None if is_last else conv.conv3x3(width, width, rngs=rngs)
            scales.append(Scale(blocks, attentions, change))
            previous = width
        self.scales = nnx.List(scales)
        self.norm = _norm(c, previous, rngs=rngs)
        self.to_pixels = conv.conv3x3(previous, 3, rngs=rngs)

    def __call__(self, z: Float[Array, "B S S D"]) -> Float[Array, "B H W 3"]:
        """Scaled pixels from latents of width latent_dim."""
        x = self.middle(self.stem(z))
        for scale in self.scales:
            x = scale(x)
            if scale.change is not None:
                x = scale.change(conv.upsample_nearest(x))
        return self.to_pixels(nnx.silu(self.norm(x)))


class ChameleonVQ(nnx.Module):
    """Chameleon's VQGAN: images in 0..1 to codes and, where the checkpoint has a decoder, back."""

    def __init__(self, config: ChameleonVQConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.encoder = VQEncoder(c, rngs=rngs)
        self.to_embedding = nnx.Linear(c.latent_dim, c.embed_dim, rngs=rngs)
        self.codebook = nnx.Embed(c.codebook_size, c.embed_dim, rngs=rngs)
        self.from_embedding = nnx.Linear(c.embed_dim, c.latent_dim, rngs=rngs)
        self.decoder = VQDecoder(c, rngs=rngs) if c.has_decoder else None

    def embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B S S D"]:
        """Embeddings before quantization; D is embed_dim."""
        return self.to_embedding(self.encoder(self.config.gain * images - 1))

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B C"]:
        """int32 codes in raster order; C is num_codes."""
        z = self.embed(images)
        return quantize.quantize(z, self.codebook.embedding[...], (z.shape[1],))

    def decode(self, codes: Int[Array, "B C"]) -> Float[Array, "B H W 3"]:
        """Images in 0..1 from codes.

        Raises:
            ValueError: this image tokenizer has no decoder.
        """
        if self.decoder is None:
            raise ValueError("this image tokenizer has no decoder")
        side = round(codes.shape[1] ** 0.5)
        z = self.codebook.embedding[...][codes].reshape(len(codes), side, side, -1)
        return jnp.clip((self.decoder(self.from_embedding(z)) + 1) / self.config.gain, 0, 1)


def _norm(config: ChameleonVQConfig, width: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(width, num_groups=config.num_groups, epsilon=_EPS, rngs=rngs)


def _res_block(
    config: ChameleonVQConfig, in_dim: int, out_dim: int, *, rngs: nnx.Rngs
) -> conv.ResBlock:
    return conv.ResBlock(in_dim, out_dim, norm=partial(_norm, config), use_bias=True, rngs=rngs)


def _blocks(
    config: ChameleonVQConfig, in_dim: int, out_dim: int, count: int, side: int, *, rngs: nnx.Rngs
) -> tuple[list[conv.ResBlock], list[SpatialAttention]]:
    dims = [in_dim] + [out_dim] * count
    blocks = [_res_block(config, a, b, rngs=rngs) for a, b in itertools.pairwise(dims)]
    attends = side in config.attention_sizes
    return blocks, [
        SpatialAttention(config, out_dim, rngs=rngs) for _ in range(count if attends else 0)
    ]
