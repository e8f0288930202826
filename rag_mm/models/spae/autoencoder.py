"""SPAE (Yu et al., NeurIPS 2023, arXiv 2306.17842): an image autoencoder with a pyramid of codes.

This file is the network; `objective` trains it, `rag_mm.ops.quantize` does the quantization.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from rag_mm.core import sharding
from rag_mm.core.code_grids import Grids
from rag_mm.models.spae import networks
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.nn import conv
from rag_mm.ops import quantize


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
        is_patch = config.encoder == "patch"
        make_encoder = networks.PatchEncoder if is_patch else networks.ConvEncoder
        self.encoder = make_encoder(config, rngs=rngs, remat=remat)
        self.decoder = networks.ImageDecoder(config, rngs=rngs, remat=remat)
        self.guide = networks.Guide(config, rngs=rngs) if config.guide_dim else None
        scale = nnx.initializers.normal(config.embed_dim**-0.5)
        shape = (config.codebook_size, config.embed_dim)
        self.codebook = nnx.Param(scale(rngs.params(), shape, jnp.float32))

    @sharding.automatic("batch")
    def embed(
        self,
        images: Float32[Array, "B H W 3"],
        embeddings: Float32[Array, "B guide_dim"] | None = None,
    ) -> Float32[Array, "B R S D"]:
        """Embeddings of the finest grid before quantization; D is embed_dim.

        `embeddings` are the retriever's of the images if the config has a guide_dim.
        """
        patches = conv.space_to_depth(images, self.config.patch_size)
        z = networks.run_in(self.dtype, self.encoder, patches)
        if self.guide is None:
            return z
        if embeddings is None:
            raise ValueError("this model is guided: give the retriever's embeddings of the images")
        added = networks.run_in(self.dtype, self.guide, embeddings)[:, None, None]
        return z + self._is_guided(z.shape[1:3]) * added

    def _is_guided(self, finest: tuple[int, int]) -> Float32[np.ndarray, "1 R S 1"]:
        """1 where a level above the full grid has codes, 0 elsewhere."""
        grids = self.config.grids_at(*(side * self.config.code_size for side in finest))
        counts = quantize.word_counts(grids)[-1]
        num_full = sum(grid == grids[-1] for grid in grids)
        return (counts > num_full).astype(np.float32)[None, :, :, None]

    @sharding.automatic("batch")
    def encode(
        self,
        images: Float32[Array, "B H W 3"],
        embeddings: Float32[Array, "B guide_dim"] | None = None,
    ) -> Int[Array, "B C"]:
        """int32 codes, coarsest level first, in raster order within a level; `embeddings` as of `embed`.

        Raises:
            UserError: as `SPAEConfig.grids_at`.
        """
        grids = self.config.grids_at(*images.shape[1:3])
        z = self.embed(images, embeddings)
        return quantize.quantize(z, self.codebook[...], grids, self.config.is_residual)

    @sharding.automatic("batch")
    def decode(
        self, codes: Int[Array, "B C"], grids: Grids | None = None
    ) -> Float32[Array, "B H W 3"]:
        """Images in 0..1 from the codes of all levels, or of the first few levels.

        `grids` are those of the images, None for images of `config.image_size`.
        """
        if grids is None:
            grids = self.config.grids_at(self.config.image_size, self.config.image_size)
        averages = quantize.running_averages(
            codes, self.codebook[...], grids, self.config.is_residual
        )
        return jnp.clip(self.render(averages[-1]), 0, 1)

    @sharding.automatic("batch")
    def render(self, z: Float32[Array, "B R S D"]) -> Float32[Array, "B H W 3"]:
        """Images, not clipped to 0..1, from embeddings of the finest grid."""
        return conv.depth_to_space(
            networks.run_in(self.dtype, self.decoder, z), self.config.patch_size
        )
