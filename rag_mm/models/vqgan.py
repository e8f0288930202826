"""VQGAN (Esser et al. 2021, section 3): the image tokenizer of Chameleon (Gafni et al. 2022) and Janus.

Unlike SPAE (`models.spae`), convolutions have biases, downsampling is by strided convolutions padded at the
bottom and right, and there is self-attention on the smallest grid. Images may have any size of at least one
code: height and width are halved, rounding down, at each scale. Emu3's image tokenizer (`models.emu3_vq`) is
made of the same encoder and decoder.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rag_mm.core import checks, code_grids, sharding
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError
from rag_mm.nn import conv
from rag_mm.ops import quantize

_EPS = 1e-6
_MIN_LENGTH = 1e-12  # as in PyTorch
Norm = Callable[..., Any]  # (width, rngs=...) -> a norm of x, or of x and the codes' embeddings


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Sizes of the image tokenizer; the defaults are Chameleon's: 512 pixels to 32x32 codes.

    Attributes:
        image_size: image height and width, in pixels.
        width: channels at the finest scale.
        width_multipliers: channels of each scale, in units of `width`.
        num_res_blocks: residual blocks at each scale of the encoder; the decoder has one more.
        attention_sizes: grid sides, for images of `image_size`, at which attention follows each block.
        latent_dim: channels between encoder, or decoder, and the codes' embeddings.
        embed_dim: width of a codebook entry.
        codebook_size: entries of the codebook.
        num_groups: groups of every GroupNorm.
        gain: the network's input is gain * x - 1 for pixels x in 0..1. Chameleon's preprocessing has
            255 * 0.0078, not 2.
        has_decoder: whether codes can be decoded; Chameleon's public checkpoints cannot.
        unit_codes: whether the decoder reads codebook entries rescaled to unit length, as Janus' does.
    """

    image_size: int = 512
    width: int = 128
    width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_sizes: tuple[int, ...] = ()
    latent_dim: int = 256
    embed_dim: int = 256
    codebook_size: int = 8192
    num_groups: int = 32
    gain: float = 1.989
    has_decoder: bool = False
    unit_codes: bool = False

    def __post_init__(self):
        widths = [self.width * multiplier for multiplier in self.width_multipliers]
        if not widths or any(
            width < 1 or width % self.num_groups for width in [self.width, *widths]
        ):
            raise ValueError(
                f"width={self.width} times width_multipliers={self.width_multipliers} are not positive "
                f"multiples of {self.num_groups}"
            )
        for name in ("num_res_blocks", "latent_dim", "embed_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, which is less than 1")
        checks.between(self, 1, checks.MAX_BLOCKS, "num_res_blocks")
        if len(self.width_multipliers) > checks.MAX_BLOCKS:
            raise ValueError(f"width_multipliers has {len(self.width_multipliers)} scales")
        if self.image_size < self.code_size:
            raise ValueError(f"image_size={self.image_size} is less than a code's {self.code_size}")

    @property
    def code_size(self) -> int:
        """Height and width of the pixels of one code."""
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def num_codes(self) -> int:
        """Codes per image of `image_size`."""
        return code_grids.num_codes(self.grids_at(self.image_size, self.image_size))

    def grids_at(self, height: int, width: int) -> Grids:
        """The one grid of codes of an image of `height` x `width` pixels.

        Raises:
            UserError: the image is smaller than one code.
        """
        if min(height, width) < self.code_size:
            raise UserError(
                f"Images have {height} x {width} pixels; this image tokenizer needs at least "
                f"{self.code_size} x {self.code_size}."
            )
        return ((height // self.code_size, width // self.code_size),)

    def at_size(self, image_size: int) -> "VQGANConfig":
        """The same network for images of another size; attention stays at its scales.

        Raises:
            ValueError: codes do not divide `image_size`.
        """
        if image_size % self.code_size:
            raise ValueError(f"codes of {self.code_size} pixels do not divide {image_size}")
        scales = range(len(self.width_multipliers))
        attends = [scale for scale in scales if self.image_size // 2**scale in self.attention_sizes]
        sides = tuple(image_size // 2**scale for scale in attends)
        return dataclasses.replace(self, image_size=image_size, attention_sizes=sides)

    @classmethod
    def janus(cls) -> "VQGANConfig":
        """Janus-Pro's (Chen et al. 2025): 384 pixels to 24x24 codes of 16,384 vectors of width 8.

        Codes are those of transformers, which compares vectors as they are. The original code first rescales
        them to unit length, which gives the same codes if the stored vectors have unit length.
        """
        return cls(
            image_size=384,
            attention_sizes=(24,),
            embed_dim=8,
            codebook_size=16_384,
            gain=2.0,
            has_decoder=True,
            unit_codes=True,
        )


class SpatialAttention(nnx.Module):
    """Single-head self-attention over all positions of a grid, with a residual connection."""

    def __init__(self, norm: Norm, width: int, *, rngs: nnx.Rngs):
        self.norm = norm(width, rngs=rngs)
        self.q, self.k, self.v, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "B H W D"], *codes: Array) -> Float[Array, "B H W D"]:
        """Attends over the grid; `codes` is a further input of the norm."""
        h = self.norm(x, *codes).reshape(x.shape[0], -1, 1, x.shape[-1])
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

    def __call__(self, x: Float[Array, "B H W D"], *codes: Array) -> Float[Array, "B H W out_dim"]:
        """Applies the blocks; the caller applies `change`."""
        for index, block in enumerate(self.blocks):
            x = block(x, *codes)
            if self.attentions:
                x = self.attentions[index](x, *codes)
        return x


class Middle(nnx.Module):
    """Block, attention, block on the code grid."""

    def __init__(self, norm: Norm, width: int, *, rngs: nnx.Rngs):
        self.block1 = _res_block(norm, width, width, rngs=rngs)
        self.attention = SpatialAttention(norm, width, rngs=rngs)
        self.block2 = _res_block(norm, width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B R C D"], *codes: Array) -> Float[Array, "B R C D"]:
        """Applies all three."""
        return self.block2(self.attention(self.block1(x, *codes), *codes), *codes)


class VQEncoder(nnx.Module):
    """Images to latents."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        c, widths = config, [config.width * m for m in config.width_multipliers]
        norm = partial(group_norm, c)
        self.stem = conv.conv3x3(3, c.width, rngs=rngs)
        scales, previous = [], c.width
        for index, width in enumerate(widths):
            is_last = index == len(widths) - 1
            attends = c.image_size // 2**index in c.attention_sizes
            dims = [previous] + [width] * c.num_res_blocks
            blocks, attentions = _blocks(norm, dims, attends, rngs=rngs)
            # Padded at the bottom and right only.
            change = (
                None
                if is_last
                else nnx.Conv(width, width, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs)
            )
            scales.append(Scale(blocks, attentions, change))
            previous = width
        self.scales = nnx.List(scales)
        self.middle = Middle(norm, previous, rngs=rngs)
        self.norm = norm(previous, rngs=rngs)
        self.to_latent = conv.conv3x3(previous, c.latent_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B R C D"]:
        """Latents of scaled pixels; D is latent_dim."""
        x = self.stem(x)
        for scale in self.scales:
            x = scale(x)
            if scale.change is not None:
                x = scale.change(x)
        return self.to_latent(nnx.silu(self.norm(self.middle(x))))


class VQDecoder(nnx.Module):
    """Latents to images: mirrors VQEncoder, with one more block per grid; `scales` go from small to large."""

    def __init__(self, config: VQGANConfig, *, norm: Norm | None = None, rngs: nnx.Rngs):
        """`norm` makes the norm of a given width; None for GroupNorm."""
        c, norm = config, norm or partial(group_norm, config)
        widths = [c.width * m for m in reversed(c.width_multipliers)]
        previous = widths[0]
        self.stem = conv.conv3x3(c.latent_dim, previous, rngs=rngs)
        self.middle = Middle(norm, previous, rngs=rngs)
        scales = []
        for index, width in enumerate(widths):
            is_last = index == len(widths) - 1
            attends = c.image_size // 2 ** (len(widths) - 1 - index) in c.attention_sizes
            dims = [previous] + [width] * (c.num_res_blocks + 1)
            blocks, attentions = _blocks(norm, dims, attends, rngs=rngs)
            change = None if is_last else conv.conv3x3(width, width, rngs=rngs)
            scales.append(Scale(blocks, attentions, change))
            previous = width
        self.scales = nnx.List(scales)
        self.norm = norm(previous, rngs=rngs)
        self.to_pixels = conv.conv3x3(previous, 3, rngs=rngs)

    def __call__(self, z: Float[Array, "B R C D"], *codes: Array) -> Float[Array, "B H W 3"]:
        """Scaled pixels from latents of width latent_dim; `codes` is a further input of every norm."""
        x = self.middle(self.stem(z), *codes)
        for scale in self.scales:
            x = scale(x, *codes)
            if scale.change is not None:
                x = scale.change(conv.upsample_nearest(x))
        return self.to_pixels(nnx.silu(self.norm(x, *codes)))


class VQGAN(nnx.Module):
    """A VQGAN: images in 0..1 to codes and, where the checkpoint has a decoder, back."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.encoder = VQEncoder(c, rngs=rngs)
        self.to_embedding = nnx.Linear(c.latent_dim, c.embed_dim, rngs=rngs)
        self.codebook = nnx.Embed(c.codebook_size, c.embed_dim, rngs=rngs)
        self.from_embedding = nnx.Linear(c.embed_dim, c.latent_dim, rngs=rngs)
        self.decoder = VQDecoder(c, rngs=rngs) if c.has_decoder else None

    @sharding.automatic("batch")
    def embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B R C D"]:
        """Embeddings before quantization, on a grid of H // code_size rows; D is embed_dim."""
        return self.to_embedding(self.encoder(self.config.gain * images - 1))

    @sharding.automatic("batch")
    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B num_codes"]:
        """int32 codes in raster order, of images of any height and width of at least `code_size`."""
        codes = quantize.nearest_codes(self.embed(images), self.codebook.embedding[...])
        return codes.reshape(len(codes), -1)

    @sharding.automatic("batch")
    def decode(
        self, codes: Int[Array, "B num_codes"], grids: Grids | None = None
    ) -> Float[Array, "B H W 3"]:
        """Images in 0..1 from codes of the one grid in `grids`; raises as `decode_grid`.

        None means images of `config.image_size`.
        """
        if grids is None:
            grids = self.config.grids_at(self.config.image_size, self.config.image_size)
        return self.decode_grid(codes.reshape(-1, *grids[0]))

    @sharding.automatic("batch")
    def decode_grid(self, codes: Int[Array, "B R C"]) -> Float[Array, "B H W 3"]:
        """Images in 0..1 from codes of any grid; H is R * code_size.

        Raises:
            ValueError: this image tokenizer has no decoder.
        """
        z = self.codebook.embedding[...][codes]
        if self.config.unit_codes:
            z /= jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), _MIN_LENGTH)
        return jnp.clip(self.render(z), 0, 1)

    @sharding.automatic("batch")
    def render(self, z: Float[Array, "B R C D"]) -> Float[Array, "B H W 3"]:
        """Images, not clipped to 0..1, from embeddings of width embed_dim; raises as `decode_grid`."""
        if self.decoder is None:
            raise ValueError("this image tokenizer has no decoder")
        return (self.decoder(self.from_embedding(z)) + 1) / self.config.gain


def group_norm(config: VQGANConfig, width: int, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """The GroupNorm of all VQGANs."""
    return nnx.GroupNorm(width, num_groups=config.num_groups, epsilon=_EPS, rngs=rngs)


def _res_block(norm: Norm, in_dim: int, out_dim: int, *, rngs: nnx.Rngs) -> conv.ResBlock:
    return conv.ResBlock(in_dim, out_dim, norm=norm, use_bias=True, rngs=rngs)


def _blocks(
    norm: Norm, dims: list[int], attends: bool, *, rngs: nnx.Rngs
) -> tuple[list[conv.ResBlock], list[SpatialAttention]]:
    """Blocks from each width to the next, and an attention after each of them if `attends`."""
    blocks = [_res_block(norm, a, b, rngs=rngs) for a, b in itertools.pairwise(dims)]
    attended = dims[1:] if attends else []
    return blocks, [SpatialAttention(norm, width, rngs=rngs) for width in attended]
