"""Emu (Sun et al., ICLR 2024, arXiv 2307.05222): a LLaMA over texts and the vectors of images.

An image becomes N vectors, which stand in place of the N `<image>` ids between `[IMG]` and `[/IMG]`. The
decoder's head predicts text; a linear regression head predicts an image's codes [N, R], one after the other.
Codes are the vectors themselves or, with targets of kind pca, what the vectors are made of.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rag_mm.core import sharding
from rag_mm.models.emu import emu_vision, image_codes
from rag_mm.models.emu.cformer import CFormer
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.nn import layers
from rag_mm.nn.decoder import Decoder, Mixture

# Of a table of vision positions: over normalized tokens, so that queries tell places apart from the start.
POSITION_STD = 1.5
# Parameters that are fitted, not trained: patterns for what a stage freezes.
FITTED = ("vision_statistics/*", "code_statistics/*", "components/*")


class Emu(nnx.Module):
    """The whole model; parts that the config leaves out are None."""

    def __init__(self, config: EmuConfig, *, rngs: nnx.Rngs):
        c, t, d = config, config.targets, config.decoder
        tokens, width = c.vision.num_tokens, c.vision.vision.embed_dim
        has_cformer = t.kind != "pca"
        how = dict(dtype=d.dtype, remat=d.remat)
        self.config = c
        self.tower = emu_vision.make_tower(c.vision, rngs=rngs, **how) if c.has_tower else None
        self.vision_statistics = (
            image_codes.Statistics(tokens, width) if t.standardises_tokens else None
        )
        make_norm = lambda: layers.Norm("layernorm", width, rngs=rngs, eps=1e-6)
        self.ln_visual = make_norm() if has_cformer else None
        make_table = lambda: layers.make_param(rngs, (tokens, width), (None, None), POSITION_STD)
        self.vision_positions = make_table() if t.has_positions else None
        self.cformer = (
            CFormer(c.cformer, width, d.embed_dim, rngs=rngs, **how) if has_cformer else None
        )
        self.class_output = (
            layers.Linear((width,), (d.embed_dim,), (None, None), use_bias=True, rngs=rngs)
            if has_cformer and t.has_class_slot
            else None
        )
        self.code_statistics = (
            image_codes.Statistics(c.num_slots, d.embed_dim) if t.kind == "standardised" else None
        )
        self.components = (
            None
            if has_cformer
            else image_codes.Components(
                c.num_slots, 4 * width, t.pca_dim, has_class_slot=t.has_class_slot
            )
        )
        self.up = (
            None
            if has_cformer
            else layers.Linear(
                (t.pca_dim,), (d.embed_dim,), (None, "embed"), use_bias=True, rngs=rngs
            )
        )
        shape = (c.num_slots, d.embed_dim)
        self.slot_positions = (
            None if has_cformer else layers.make_param(rngs, shape, (None, "embed"), d.init.std)
        )
        self.anchor = (
            layers.Linear(
                (c.num_slots, d.embed_dim), (tokens, width), (None,) * 4, use_bias=True, rngs=rngs
            )
            if t.anchor_weight
            else None
        )
        self.decoder = Decoder(d, rngs=rngs)
        into, out = (d.embed_dim,), (c.code_dim,)
        self.regression = layers.Linear(into, out, ("embed", None), use_bias=False, rngs=rngs)

    def see(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B M C"]:
        """The tower's tokens of images in [0, 1].

        Raises:
            ValueError: the tower is not a part of the model.
        """
        if self.tower is None:
            raise ValueError("the model has no tower: give it the tokens of a frozen one")
        return self.tower.tokens(images)

    def normal(self, tokens: Float[Array, "B M C"]) -> Float[Array, "B M C"]:
        """The tower's tokens, standardised where the config says so: what the anchor has to give back."""
        return tokens if self.vision_statistics is None else self.vision_statistics(tokens)

    def encode(
        self, tokens: Float[Array, "B M C"], is_counted: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B N R"]:
        """Codes of images, in the dtype of activations.

        Args:
            tokens: the tower's, of each image.
            is_counted: in training, which images are not filling: standardised codes then have the
                statistics of these images. None: the stored ones.
        """
        tokens = self.normal(tokens.astype(self.config.decoder.dtype))
        if self.components is not None:
            return self.components(tokens)
        assert self.ln_visual is not None and self.cformer is not None
        seen = self.ln_visual(tokens)
        read = seen
        if self.vision_positions is not None:
            table = sharding.gather(self.vision_positions[...], (None, None))
            read = seen + table.astype(seen.dtype)[None]
        codes = self.cformer(read)
        if self.class_output is not None:
            codes = jnp.concatenate([self.class_output(seen[:, :1]), codes], axis=1)
        if self.code_statistics is None:
            return codes
        if is_counted is None:
            return self.code_statistics(codes)
        return image_codes.standardise(codes, is_counted)

    def to_vectors(
        self, codes: Float[Array, "B K R"], first: Int[Array, ""] | int = 0
    ) -> Float[Array, "B K D"]:
        """The decoder's inputs that codes of slots `first`, `first` + 1, ... become."""
        codes = codes.astype(self.config.decoder.dtype)
        if self.up is None or self.slot_positions is None:
            return codes
        table = sharding.gather(self.slot_positions[...], (None, None)).astype(codes.dtype)
        places = jax.lax.dynamic_slice_in_dim(table, first, codes.shape[1])
        return self.up(codes) + places[None]

    def regress(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """The next code, from hidden states; the regression head, without a bias."""
        return self.regression(hidden)

    def mix(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        slot: Int[Array | np.ndarray, "B T"],
        vectors: Float[Array, "B J D"],
    ) -> Mixture:
        """Inputs of the decoder: ids, and at each slot the vector of its number in a row's J."""
        tokens, slot = jnp.asarray(tokens), jnp.asarray(slot)
        return Mixture(tokens, take(vectors, slot), slot >= 0)


@sharding.automatic("batch")
def take(values: Float[Array, "B J D"], slot: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """values[b, slot[b, t]]; that of 0 where slot is -1."""
    return jnp.take_along_axis(values, jnp.maximum(slot, 0)[:, :, None], axis=1)
