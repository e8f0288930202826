"""Encoders and decoder of SPAE's image autoencoder: MAGVIT's 2D convolutions, or patches on their own."""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.nn import conv
from rag_mm.nn.block import REMAT


def code_patches(
    images: Float[Array | np.ndarray, "B H W 3"], config: SPAEConfig
) -> Float[Array, "B R S code_dim"]:
    """The pixels of each code of the finest grid, in the order in which the shortcuts take them."""
    patches = conv.space_to_depth(jnp.asarray(images), config.patch_size)
    return _fold(patches, config.code_size // config.patch_size)


class PatchEncoder(nnx.Module):
    """Embeds each patch independently: equal patches get equal codes at any position."""

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs, remat: str = "none"):
        self.remat, patch_dim = remat, 3 * config.patch_size**2
        self.shortcut = _shortcut(patch_dim, config.embed_dim, rngs)
        self.stem = nnx.Linear(patch_dim, config.width, rngs=rngs)
        self.blocks = nnx.List(
            [conv.PointwiseBlock(config.width, rngs=rngs) for _ in range(config.num_res_blocks)]
        )
        self.to_embedding = nnx.Linear(
            config.width, config.embed_dim, kernel_init=_zeros(), rngs=rngs
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
        has_shortcut = config.encoder == "conv_shortcut"
        start = _zeros() if has_shortcut else nnx.initializers.lecun_normal()
        self.to_embedding = nnx.Linear(previous, config.embed_dim, kernel_init=start, rngs=rngs)
        self.factor = config.code_size // config.patch_size
        self.shortcut = (
            _shortcut(3 * config.code_size**2, config.embed_dim, rngs) if has_shortcut else None
        )

    def __call__(self, patches: Float[Array, "B H W patch_dim"]) -> Float[Array, "B R S D"]:
        """Embeds patches of 3 * patch_size ** 2 values; D is embed_dim."""
        z = self._convolve(patches)
        if self.shortcut is None:
            return z
        return z + self.shortcut(_fold(patches, self.factor))

    def _convolve(self, patches: Float[Array, "B H W patch_dim"]) -> Float[Array, "B R S D"]:
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
        self.factor, has_shortcut = config.code_size // config.patch_size, config.encoder != "conv"
        if has_shortcut:
            self.to_patches.kernel[...] = jnp.zeros_like(self.to_patches.kernel[...])
        self.shortcut = (
            _shortcut(config.embed_dim, 3 * config.code_size**2, rngs) if has_shortcut else None
        )

    def __call__(self, z: Float[Array, "B R S D"]) -> Float[Array, "B H W patch_dim"]:
        """Patches of 3 * patch_size ** 2 values from embeddings of width embed_dim."""
        h = _apply(self.blocks.layers, self.stem(z), self.remat)
        for index, blocks in enumerate(self.scales):
            h = _apply(blocks.layers, h, self.remat)
            if index < len(self.ups):
                h = self.ups[index](conv.upsample_nearest(h))
        patches = self.to_patches(nnx.silu(self.norm(h)))
        if self.shortcut is None:
            return patches
        return patches + _unfold(self.shortcut(z), self.factor)


class Guide(nnx.Module):
    """Maps a frozen retriever's embedding of an image to the latent width: linear, plus an MLP.

    The MLP starts at zero, so that the linear map, which may be set from a least-squares fit, is the start.
    """

    def __init__(self, config: SPAEConfig, *, rngs: nnx.Rngs):
        hidden = 4 * config.guide_dim
        self.linear = nnx.Linear(
            config.guide_dim, config.embed_dim, kernel_init=_zeros(), rngs=rngs
        )
        self.up = nnx.Linear(config.guide_dim, hidden, rngs=rngs)
        self.down = nnx.Linear(
            hidden, config.embed_dim, use_bias=False, kernel_init=_zeros(), rngs=rngs
        )

    def __call__(self, embeddings: Float[Array, "B guide_dim"]) -> Float[Array, "B D"]:
        """Latents of width embed_dim from embeddings of length 1."""
        return self.linear(embeddings) + self.down(nnx.gelu(self.up(embeddings)))


def run_in(dtype: str, network: nnx.Module, x: Float32[Array, "..."]) -> Float32[Array, "..."]:
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


def _shortcut(in_dim: int, out_dim: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(in_dim, out_dim, kernel_init=_init_eye, rngs=rngs)


def _zeros() -> nnx.Initializer:
    return nnx.initializers.zeros_init()


def _fold(patches: Float[Array, "B H W patch_dim"], factor: int) -> Float[Array, "B R S code_dim"]:
    """Patches as the larger patches of one code each."""
    return conv.space_to_depth(patches, factor) if factor > 1 else patches


def _unfold(
    patches: Float[Array, "B R S code_dim"], factor: int
) -> Float[Array, "B H W patch_dim"]:
    """Inverse of `_fold`."""
    return conv.depth_to_space(patches, factor) if factor > 1 else patches


def _init_eye(key: jax.Array, shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Identity, cropped or zero-padded: embeddings of a new patch encoder are the pixels themselves."""
    del key
    return jnp.eye(*shape, dtype=dtype)
