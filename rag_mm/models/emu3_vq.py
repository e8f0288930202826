"""Emu3's image tokenizer (Wang et al. 2024, arXiv 2409.18869, section 2.2): a video tokenizer, for images.

An image is a video of `num_frames` equal frames, which the encoder joins into one; the decoder's first frame
is the image. Encoder and decoder are VQGAN's (`models.vqgan`), where every norm of the decoder also reads the
codes' embeddings, with convolutions over time between them and the codebook. These are causal: a frame sees
itself and earlier ones, and zeros before the first.
"""

import dataclasses
import math
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rag_mm.core import sharding
from rag_mm.models import vqgan

_EPS = 1e-5  # of BatchNorm


@dataclasses.dataclass(frozen=True)
class Emu3VQConfig(vqgan.VQGANConfig):
    """Sizes of the image tokenizer; the defaults are Emu3's, for 512 pixels: 64x64 codes.

    Attributes:
        image_size, width, width_multipliers, attention_sizes, latent_dim, embed_dim, codebook_size, gain,
            has_decoder: as of `VQGANConfig`; the decoder needs latent_dim = embed_dim.
        num_frames: frames that share one grid of codes; a power of two.
    """

    image_size: int = 512
    width: int = 256
    width_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    attention_sizes: tuple[int, ...] = (64,)
    latent_dim: int = 4
    embed_dim: int = 4
    codebook_size: int = 32_768
    gain: float = 2.0
    has_decoder: bool = True
    num_frames: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.num_frames < 1 or self.num_frames & (self.num_frames - 1):
            raise ValueError(f"num_frames is {self.num_frames}, which is not a power of two")
        if self.latent_dim != self.embed_dim:
            raise ValueError(
                f"latent_dim is {self.latent_dim} and embed_dim {self.embed_dim}; they must be equal"
            )

    @property
    def num_halvings(self) -> int:
        """How many convolutions halve the number of frames."""
        return int(math.log2(self.num_frames))


class SpatialNorm(nnx.Module):
    """GroupNorm whose scale and shift are linear in the codes' embeddings at that place."""

    def __init__(self, config: Emu3VQConfig, width: int, *, rngs: nnx.Rngs):
        self.norm = vqgan.group_norm(config, width, rngs=rngs)
        self.scale = nnx.Linear(config.embed_dim, width, rngs=rngs)
        self.shift = nnx.Linear(config.embed_dim, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W width"], codes: Float[Array, "B R C D"]
    ) -> Float[Array, "B H W width"]:
        """Normalizes `x`; `codes` are repeated to its height and width."""
        times = x.shape[1] // codes.shape[1]
        repeat = lambda y: jnp.repeat(jnp.repeat(y, times, axis=1), times, axis=2)
        return self.norm(x) * repeat(self.scale(codes)) + repeat(self.shift(codes))


class FrozenBatchNorm(nnx.Module):
    """BatchNorm with fixed statistics."""

    def __init__(self, width: int):
        self.scale, self.variance = (nnx.Param(jnp.ones(width)) for _ in range(2))
        self.bias, self.mean = (nnx.Param(jnp.zeros(width)) for _ in range(2))

    def __call__(self, x: Float[Array, "B T H W D"]) -> Float[Array, "B T H W D"]:
        scale = self.scale[...] / jnp.sqrt(self.variance[...] + _EPS)
        shift = self.bias[...] - self.mean[...] * scale
        return x * scale[None, None, None, None] + shift[None, None, None, None]


class TimeBlock(nnx.Module):
    """Twice norm, swish and 3x3x3 convolution, plus a skip connection."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = FrozenBatchNorm(width), FrozenBatchNorm(width)
        self.conv1 = causal_conv(width, width, (3, 3, 3), rngs=rngs)
        self.conv2 = causal_conv(width, width, (3, 3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W D"]) -> Float[Array, "B T H W D"]:
        h = self.conv1(nnx.silu(self.norm1(x)))
        return x + self.conv2(nnx.silu(self.norm2(h)))


class Emu3VQ(vqgan.VQGAN):
    """Emu3's image tokenizer: images in 0..1 to codes and back."""

    config: Emu3VQConfig
    decoder: vqgan.VQDecoder

    def __init__(self, config: Emu3VQConfig, *, rngs: nnx.Rngs):
        c, width, embed_dim = config, config.latent_dim, config.embed_dim
        self.config = c
        self.encoder = vqgan.VQEncoder(c, rngs=rngs)
        blocks = lambda: nnx.List([TimeBlock(width, rngs=rngs) for _ in range(c.num_res_blocks)])
        halve = partial(causal_conv, width, width, (4, 3, 3), stride=2, rngs=rngs)
        self.halvings = nnx.List([halve() for _ in range(c.num_halvings)])
        self.encoder_blocks = blocks()
        self.to_embedding = causal_conv(width, embed_dim, (3, 1, 1), rngs=rngs)
        self.codebook = nnx.Embed(c.codebook_size, embed_dim, rngs=rngs)
        self.from_embedding = causal_conv(embed_dim, width, (3, 1, 1), rngs=rngs)
        self.decoder_blocks = blocks()
        double = partial(causal_conv, width, width, (3, 3, 3), rngs=rngs)
        self.doublings = nnx.List([double() for _ in range(c.num_halvings)])
        self.decoder = vqgan.VQDecoder(c, norm=partial(SpatialNorm, c), rngs=rngs)

    @sharding.automatic("batch")
    def embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B R C D"]:
        """Embeddings before quantization, on a grid of H // code_size rows; D is embed_dim."""
        latents = self.encoder(self.config.gain * images - 1)
        x = jnp.repeat(latents[:, None], self.config.num_frames, axis=1)
        for halve in self.halvings:
            x = nnx.silu(halve(x))
        for block in self.encoder_blocks:
            x = block(x)
        return self.to_embedding(x)[:, 0]

    @sharding.automatic("batch")
    def render(self, z: Float[Array, "B R C D"]) -> Float[Array, "B H W 3"]:
        """Images, not clipped to 0..1, from embeddings of width embed_dim."""
        z = z[:, None]
        latents = self._first_frame(self.from_embedding(z))
        pixels = self.decoder(latents, self._first_frame(z))
        return (pixels + 1) / self.config.gain

    def _first_frame(self, x: Float[Array, "B 1 R C D"]) -> Float[Array, "B R C D"]:
        """The decoder's convolutions over time. The first frame needs no later one, so none is made."""
        for block in self.decoder_blocks:
            x = block(x)
        for double in self.doublings:
            x = nnx.silu(double(x))
        return x[:, 0]


def causal_conv(
    in_dim: int, out_dim: int, kernel: tuple[int, int, int], stride: int = 1, *, rngs: nnx.Rngs
) -> nnx.Conv:
    """A convolution over time, height and width [B, T, H, W, D]; `stride` is of time.

    Two frames of zeros precede the first; height and width are kept.
    """
    edges = [(size // 2, size // 2) for size in kernel[1:]]
    return nnx.Conv(
        in_dim, out_dim, kernel, strides=(stride, 1, 1), padding=[(2, 0), *edges], rngs=rngs
    )
