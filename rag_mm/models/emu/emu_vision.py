"""The image towers that Emu reads, EVA-CLIP's or CLIP's: their tokens before the last norm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rag_mm.core import sharding
from rag_mm.models import clip
from rag_mm.models.emu.emu_config import VisionConfig
from rag_mm.nn import block, layers
from rag_mm.ops import attention


class CLIPTokens(clip.VisionTower):
    """CLIP's image tower without its last norm; its other parameters are named as there."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: str, remat: str):
        super().__init__(config, rngs=rngs, dtype=dtype, remat=remat)
        del self.post_norm


class EVAAttention(nnx.Module):
    """Attention of all patches to all, with one projection to q, k and v, of which k has no bias."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        c = config.vision
        heads = (c.num_heads, c.embed_dim // c.num_heads)
        self.qkv = layers.Linear(
            (c.embed_dim,), (3, *heads), ("embed", None, "heads", None), use_bias=False, rngs=rngs
        )
        zeros, axes = jnp.zeros(heads, jnp.float32), ("heads", None)
        self.q_bias, self.v_bias = nnx.Param(zeros, axes=axes), nnx.Param(zeros, axes=axes)
        std = config.vision.block(config.mlp).output_init_std
        out = ("heads", None, "embed")
        self.out = layers.Linear(heads, (c.embed_dim,), out, use_bias=True, rngs=rngs, std=std)

    def __call__(self, x: Float[Array, "B M C"]) -> Float[Array, "B M C"]:
        """What each token reads."""
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        q_bias, v_bias = (
            sharding.gather(each[...], ("heads", None)).astype(x.dtype)[None, None]
            for each in (self.q_bias, self.v_bias)
        )
        return self.out(attention.attention(q + q_bias, k, v + v_bias, is_causal=False))


class EVABlock(nnx.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        def make_norm() -> layers.Norm:
            dim, eps = config.vision.embed_dim, config.norm_eps
            return layers.Norm("layernorm", dim, rngs=rngs, eps=eps)

        self.attention_norm, self.mlp_norm = make_norm(), make_norm()
        self.attention = EVAAttention(config, rngs=rngs)
        self.mlp = block.MLP(config.vision.block(config.mlp), rngs=rngs)

    def __call__(self, x: Float[Array, "B M C"]) -> Float[Array, "B M C"]:
        """The residual stream behind the block."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class EVATokens(nnx.Module):
    """EVA's image tower without its last norm; learned absolute positions, biases in all but k."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: str, remat: str):
        c, width = config, config.vision.embed_dim
        self.config, self.dtype, self.remat = c, dtype, remat
        self.patches = layers.Linear(
            (c.patch_size**2 * 3,), (width,), (None, "embed"), use_bias=True, rngs=rngs
        )
        self.class_embedding = layers.make_param(rngs, (width,), ("embed",), 0.02)
        shape = (c.num_tokens, width)
        self.position_embedding = layers.make_param(rngs, shape, (None, "embed"), 0.02)
        keys = jax.random.split(rngs.params(), c.vision.num_layers)
        self.blocks = jax.vmap(lambda key: EVABlock(c, rngs=nnx.Rngs(params=key)))(keys)

    def tokens(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B M C"]:
        """The class token, then the patches in raster order, after the last block."""
        x = self.patches(clip.to_patches(images, self.config).astype(self.dtype))
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
        positions = sharding.gather(self.position_embedding[...], (None, None))
        class_vector = sharding.gather(self.class_embedding[...], (None,))
        x = x + positions.at[0].add(class_vector).astype(x.dtype)[None]

        def layer(x: jax.Array, each: EVABlock) -> tuple[jax.Array, None]:
            return each(x), None

        return jax.lax.scan(block.REMAT[self.remat](layer), x, self.blocks)[0]


def make_tower(config: VisionConfig, **how: Any) -> CLIPTokens | EVATokens:
    """The tower; `how` are rngs, dtype and remat. `tokens` of images float [B, H, W, 3] are [B, M, C]."""
    return EVATokens(config, **how) if config.is_eva else CLIPTokens(config, **how)
