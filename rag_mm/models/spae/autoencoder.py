"""SPAE (Yu et al., NeurIPS 2023, arXiv 2306.17842): an image autoencoder with a pyramid of codes.

This file is the network; `objective` trains it, `rag_mm.ops.quantize` does the quantization.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from rag_mm.core import checks, code_grids, sharding
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError
from rag_mm.nn import conv
from rag_mm.nn.block import REMAT
from rag_mm.ops import quantize


@dataclasses.dataclass(frozen=True)
class SPAEConfig:
    """Sizes of the image tokenizer; the defaults are SPAE's image model at 128 pixels.

    A model takes images of any height and width that its coarsest grid divides (`grids_at`).

    Attributes:
        image_size: image height and width, in pixels.
        patch_size: height and width of the patches folded into channels at input and output, in pixels.
        encoder: conv | patch; with patch, a code sees only the pixels of its patch.
        width: channels at the finest scale.
        width_multipliers: channels of each scale, in units of `width`.
        num_res_blocks: residual blocks at each scale, and once more on the code grid.
        embed_dim: width of a codebook entry.
        codebook_size: entries of the codebook.
        levels: positions a side of each pyramid level, coarse to fine, in images of `image_size`.
        commitment_weight: weight of the commitment loss.
        random_flip_rotate: training images are flipped and rotated by quarter turns at random.
    """

    image_size: int = 128
    patch_size: int = 1
    encoder: str = "conv"
    width: int = 128
    width_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    embed_dim: int = 256
    codebook_size: int = 8192
    levels: tuple[int, ...] = (1, 2, 4, 8, 16, 16)
    commitment_weight: float = 0.33
    random_flip_rotate: bool = False

    def __post_init__(self):
        quantize.check_levels(self.levels)
        for name in ("patch_size", "width", "embed_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is too small: give at least 1.")
        checks.between(self, 0, checks.MAX_BLOCKS, "num_res_blocks")
        scales = self.width_multipliers
        if not 1 <= len(scales) <= checks.MAX_BLOCKS or min(scales) < 1:
            raise UserError(
                f"width_multipliers={scales}: give 1 to {checks.MAX_BLOCKS} of at least 1."
            )
        fitting = self.code_size * self.levels[-1]
        if self.image_size != fitting:
            raise UserError(
                f"image_size={self.image_size} does not fit: patches and scales downsample by "
                f"{self.code_size} and the last level is a grid of {self.levels[-1]}, so it must be "
                f"{fitting}."
            )
        if self.encoder not in ("conv", "patch"):
            raise UserError(f"encoder={self.encoder!r} is unknown: choose conv or patch.")
        if self.encoder == "patch" and len(self.width_multipliers) > 1:
            raise UserError("encoder=patch has one scale: give a single width multiplier.")

    @property
    def code_size(self) -> int:
        """Height and width of the pixels of one code of the finest grid."""
        return self.patch_size * 2 ** (len(self.width_multipliers) - 1)

    @property
    def num_codes(self) -> int:
        """Codes per image of `image_size`."""
        return code_grids.num_codes(self.grids_at(self.image_size, self.image_size))

    def grids_at(self, height: int, width: int) -> Grids:
        """The grids of an image of `height` x `width` pixels; they grow with the image.

        With levels=(4, 8), for instance, an image of half of `image_size` has grids of 2x2 and 4x4.

        Raises:
            UserError: a grid does not divide the image.
        """
        strides = [self.levels[-1] // side for side in self.levels]  # in codes of the finest grid
        multiple = self.code_size * math.lcm(*strides)
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise UserError(
                f"Images of {height} x {width} pixels do not fit the image tokenizer's levels={self.levels}; "
                f"give a height and a width that are multiples of {multiple}."
            )
        rows, columns = height // self.code_size, width // self.code_size
        return tuple((rows // stride, columns // stride) for stride in strides)

    @classmethod
    def tiny(cls) -> "SPAEConfig":
        """For tests: 32-pixel images as 64 codes, codebook of 256, plain VQ; trains in seconds."""
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
    """Embeds each patch independently: equal patches get equal codes at any position."""

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs, remat: str = "none"):
        self.remat, patch_dim = remat, 3 * config.patch_size**2
        self.shortcut = nnx.Linear(patch_dim, config.embed_dim, kernel_init=_init_eye, rngs=rngs)
        self.stem = nnx.Linear(patch_dim, config.width, rngs=rngs)
        self.blocks = nnx.List(
            [conv.PointwiseBlock(config.width, rngs=rngs) for _ in range(config.num_res_blocks)]
        )
        self.to_embedding = nnx.Linear(
            config.width, config.embed_dim, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(self, patches: Float[Array, "B R S patch_dim"]) -> Float[Array, "B R S D"]:
        """Embeds patches of 3 * patch_size ** 2 values; D is embed_dim."""
        h = _apply(self.blocks, self.stem(patches), self.remat)
        return self.shortcut(patches) + self.to_embedding(h)


class ConvEncoder(nnx.Module):
    """Residual blocks with average pooling between scales."""

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs, remat: str = "none"):
        self.remat, widths = remat, [config.width * m for m in config.width_multipliers]
        self.stem = conv.conv3x3(3 * config.patch_size**2, widths[0], rngs=rngs)
        scales, previous = [], widths[0]
        for width in [*widths, widths[-1]]:  # one more group of blocks on the code grid
            scales.append(_res_blocks(previous, width, config.num_res_blocks, rngs=rngs))
            previous = width
        self.scales = nnx.List(scales)
        self.norm = conv.group_norm(previous, rngs=rngs)
        self.to_embedding = nnx.Linear(previous, config.embed_dim, rngs=rngs)

    def __call__(self, patches: Float[Array, "B H W patch_dim"]) -> Float[Array, "B R S D"]:
        """Embeds patches of 3 * patch_size ** 2 values; D is embed_dim."""
        h = self.stem(patches)
        for index, blocks in enumerate(self.scales):
            h = _apply(blocks.layers, h, self.remat)
            if index < len(self.scales) - 2:
                h = conv.average_pool(h)
        return self.to_embedding(nnx.silu(self.norm(h)))


class ImageDecoder(nnx.Module):
    """Mirrors ConvEncoder, with nearest-neighbor upsampling and a convolution between scales."""

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs, remat: str = "none"):
        self.remat, widths = remat, [config.width * m for m in reversed(config.width_multipliers)]
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

    def __call__(self, z: Float[Array, "B R S D"]) -> Float[Array, "B H W patch_dim"]:
        """Patches of 3 * patch_size ** 2 values from embeddings of width embed_dim."""
        h = _apply(self.blocks.layers, self.stem(z), self.remat)
        for index, blocks in enumerate(self.scales):
            h = _apply(blocks.layers, h, self.remat)
            if index < len(self.ups):
                h = self.ups[index](conv.upsample_nearest(h))
        patches = self.to_patches(nnx.silu(self.norm(h)))
        return patches if self.shortcut is None else patches + self.shortcut(z)


class SPAE(nnx.Module):
    """SPAE: images to a pyramid of codes and back; images are RGB in 0..1."""

    def __init__(
        self,
        config: SPAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        """`dtype` is that of activations; `remat` is none, or full if each block is to be recomputed."""
        self.config, self.dtype = config, dtype
        make_encoder = PatchEncoder if config.encoder == "patch" else ConvEncoder
        self.encoder = make_encoder(config, rngs=rngs, remat=remat)
        self.decoder = ImageDecoder(config, rngs=rngs, remat=remat)
        scale = nnx.initializers.normal(config.embed_dim**-0.5)
        shape = (config.codebook_size, config.embed_dim)
        self.codebook = nnx.Param(scale(rngs.params(), shape, jnp.float32))

    @sharding.automatic("batch")
    def embed(self, images: Float32[Array, "B H W 3"]) -> Float32[Array, "B R S D"]:
        """Embeddings of the finest grid before quantization; D is embed_dim."""
        patches = conv.space_to_depth(images, self.config.patch_size)
        return _run_in(self.dtype, self.encoder, patches)

    @sharding.automatic("batch")
    def encode(self, images: Float32[Array, "B H W 3"]) -> Int[Array, "B C"]:
        """int32 codes, coarsest level first, in raster order within a level.

        Raises:
            UserError: as `SPAEConfig.grids_at`.
        """
        grids = self.config.grids_at(*images.shape[1:3])
        return quantize.quantize(self.embed(images), self.codebook[...], grids)

    @sharding.automatic("batch")
    def decode(
        self, codes: Int[Array, "B C"], grids: Grids | None = None
    ) -> Float32[Array, "B H W 3"]:
        """Images in 0..1 from the codes of all levels, or of the first few levels.

        `grids` are those of the images, None for images of `config.image_size`.
        """
        if grids is None:
            grids = self.config.grids_at(self.config.image_size, self.config.image_size)
        averages = quantize.running_averages(codes, self.codebook[...], grids)
        return jnp.clip(self.render(averages[-1]), 0, 1)

    @sharding.automatic("batch")
    def render(self, z: Float32[Array, "B R S D"]) -> Float32[Array, "B H W 3"]:
        """Images, not clipped to 0..1, from embeddings of the finest grid."""
        return conv.depth_to_space(_run_in(self.dtype, self.decoder, z), self.config.patch_size)


def _run_in(dtype: str, network: nnx.Module, x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """network(x) with parameters and activations cast to `dtype`; returns float32."""
    cast = lambda leaf: leaf.astype(dtype)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms take their means in float32.
        return jax.tree.map(cast, network)(cast(x)).astype(jnp.float32)


def _apply(blocks: Iterable[nnx.Module], x: Float[Array, "..."], remat: str) -> Float[Array, "..."]:
    """Applies the blocks one after the other, each of which the backward pass may recompute."""
    for block in blocks:
        x = REMAT[remat](lambda block, x: block(x))(block, x)
    return x


def _res_blocks(in_dim: int, out_dim: int, count: int, *, rngs: nnx.Rngs) -> nnx.Sequential:
    dims = [in_dim] + [out_dim] * count
    return nnx.Sequential(*[conv.ResBlock(a, b, rngs=rngs) for a, b in itertools.pairwise(dims)])


def _init_eye(key: jax.Array, shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Identity, cropped or zero-padded: embeddings of a new patch encoder are the pixels themselves."""
    del key
    return jnp.eye(*shape, dtype=dtype)
