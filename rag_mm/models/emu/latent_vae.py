"""Stable Diffusion's autoencoder (Rombach et al. 2022): images to latents of an eighth of their side.

Encoder and decoder are those of a VQGAN (`models.vqgan`); instead of codes there is a Gaussian at each place.
It computes what diffusers' `AutoencoderKL` does.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Key

from rag_mm.core import checks, sharding
from rag_mm.models import vqgan

_LOG_VARIANCES = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class LatentVAEConfig:
    """Sizes of the autoencoder; the defaults are Stable Diffusion 1.5's.

    Attributes:
        image_size: pixels a side.
        widths: channels of each grid, from fine to coarse.
        num_res_blocks: residual blocks of each grid of the encoder; the decoder has one more.
        latent_dim: channels of latents.
        num_groups: of every group norm.
        scale: latents are multiplied by it, so that their standard deviation is about 1.
    """

    image_size: int = 512
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    latent_dim: int = 4
    num_groups: int = 32
    scale: float = 0.18215

    def __post_init__(self):
        checks.at_least(self, 1, "image_size", "latent_dim")
        checks.above(self, 0, "scale")
        self.coder(self.latent_dim)
        if self.image_size % self.downsampling:
            raise ValueError(f"image_size={self.image_size} is no multiple of {self.downsampling}")

    @property
    def downsampling(self) -> int:
        """Pixels a side of a latent."""
        return 2 ** (len(self.widths) - 1)

    @property
    def latent_size(self) -> int:
        """Rows and columns of an image's latents."""
        return self.image_size // self.downsampling

    def coder(self, latent_dim: int) -> vqgan.VQGANConfig:
        """Sizes of encoder or decoder, which has `latent_dim` channels at its small end."""
        return vqgan.VQGANConfig(
            self.image_size,
            width=self.widths[0] if self.widths else 0,
            width_multipliers=tuple(width // self.widths[0] for width in self.widths),
            num_res_blocks=self.num_res_blocks,
            latent_dim=latent_dim,
            num_groups=self.num_groups,
        )


class LatentVAE(nnx.Module):
    """The autoencoder; pixels are -1..1."""

    def __init__(self, config: LatentVAEConfig, *, rngs: nnx.Rngs):
        c, dim = config, config.latent_dim
        self.config = c
        self.encoder = vqgan.VQEncoder(c.coder(2 * dim), rngs=rngs)
        self.to_moments = nnx.Linear(2 * dim, 2 * dim, rngs=rngs)
        self.from_latent = nnx.Linear(dim, dim, rngs=rngs)
        self.decoder = vqgan.VQDecoder(c.coder(dim), rngs=rngs)

    @sharding.automatic("batch")
    def encode(
        self, images: Float32[Array, "B H W 3"], rng: Key[Array, ""] | None = None
    ) -> Float32[Array, "B h w C"]:
        """Scaled latents: the means, or samples if there is a key."""
        moments = self.to_moments(self.encoder(images))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        if rng is not None:
            deviation = jnp.exp(jnp.clip(log_variance, *_LOG_VARIANCES) / 2)
            mean = mean + deviation * jax.random.normal(rng, mean.shape)
        return mean * self.config.scale

    @sharding.automatic("batch")
    def decode(self, latents: Float32[Array, "B h w C"]) -> Float32[Array, "B H W 3"]:
        """Images, not clipped, of scaled latents."""
        return self.decoder(self.from_latent(latents / self.config.scale))
