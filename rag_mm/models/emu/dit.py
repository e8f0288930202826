"""A small diffusion transformer (Peebles & Xie 2023) that reads its condition by cross-attention.

Patches of a noisy image are tokens; the step's embedding shifts, scales and weights what each block adds.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from rag_mm.core import checks, sharding
from rag_mm.nn import block, conv, layers
from rag_mm.ops import attention

_NUM_WAVES = 32  # Of the step's embedding.
_POSITION_STD = 0.5


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of a diffusion transformer; the defaults draw small images in minutes on two cores.

    Attributes:
        image_size: pixels a side of what is denoised.
        num_channels: 3 for pixels.
        patch_size: pixels a side of a token.
        num_layers: blocks.
        embed_dim: width.
        num_heads: heads of both attentions.
        mlp_dim: hidden width of the MLP.
        remat: what the backward pass computes again: none | dots | full.
    """

    image_size: int = 32
    num_channels: int = 3
    patch_size: int = 8
    num_layers: int = 3
    embed_dim: int = 128
    num_heads: int = 4
    mlp_dim: int = 256
    remat: str = "none"

    def __post_init__(self):
        sizes = ("image_size", "num_channels", "patch_size", "embed_dim", "num_heads", "mlp_dim")
        checks.at_least(self, 1, "num_layers", *sizes)
        checks.one_of(self, "remat", block.REMAT)
        for whole, part in (("image_size", "patch_size"), ("embed_dim", "num_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part}={getattr(self, part)} does not divide {whole}={getattr(self, whole)}"
                )

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.patch_size**2 * self.num_channels

    def block(self, context_dim: int | None = None) -> block.BlockConfig:
        """Sizes of a block's parts."""
        c = self
        return block.BlockConfig(
            c.embed_dim,
            c.num_heads,
            c.mlp_dim,
            num_kv_heads=c.num_heads,
            head_dim=c.embed_dim // c.num_heads,
            qk_norm=True,
            rope_theta=None,
            output_init_std=0.5 / math.sqrt(c.num_layers * c.embed_dim),
            context_dim=context_dim,
        )


class DiTBlock(nnx.Module):
    """Self-attention, cross-attention and MLP; the step's embedding modulates the first and the last."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        c, width = config, config.embed_dim
        make_norm = lambda: layers.Norm("rmsnorm", width, rngs=rngs, eps=1e-6)
        self.attention_norm, self.cross_norm, self.mlp_norm = (make_norm() for _ in range(3))
        self.attention = block.Attention(c.block(), rngs=rngs)
        self.cross_attention = block.CrossAttention(c.block(width), rngs=rngs)
        self.mlp = block.MLP(c.block(), rngs=rngs)
        self.modulation = layers.Linear(
            (width,), (6, width), ("embed", None, None), use_bias=True, rngs=rngs, std=0.0
        )

    def __call__(
        self,
        x: Float[Array, "B P D"],
        step: Float[Array, "B 1 D"],
        condition: Float[Array, "B N D"],
    ) -> Float[Array, "B P D"]:
        """The tokens behind the block."""
        shift, scale, gain, mlp_shift, mlp_scale, mlp_gain = jnp.moveaxis(
            self.modulation(step), 2, 0
        )
        heads = self.attention.heads(self.attention_norm(x) * (1 + scale) + shift, None)
        read = attention.attention(heads.q, heads.k, heads.v, is_causal=False)
        x = x + self.attention.out(read) * (1 + gain)
        context = self.cross_attention.read(block.Context(condition))
        x = x + self.cross_attention(self.cross_norm(x), context)
        return x + self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift) * (1 + mlp_gain)


class DiT(nnx.Module):
    """Predicts what `NoiseConfig.prediction` says, from a noisy image, its step and a condition."""

    def __init__(self, config: DiTConfig, num_slots: int, condition_dim: int, *, rngs: nnx.Rngs):
        """Conditions are `num_slots` vectors of width `condition_dim`."""
        c, width = config, config.embed_dim
        self.config = c
        linear = lambda i, o, **how: layers.Linear(
            (i,), (o,), (None, None), use_bias=True, rngs=rngs, **how
        )
        table = lambda rows: layers.make_param(rngs, (rows, width), (None, None), _POSITION_STD)
        self.patches, self.positions = linear(c.patch_dim, width), table(c.num_patches)
        self.condition, self.slots = linear(condition_dim, width), table(num_slots)
        self.condition_norm = layers.Norm("rmsnorm", width, rngs=rngs, eps=1e-6)
        self.step_in, self.step_out = linear(2 * _NUM_WAVES, width), linear(width, width)
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.blocks = jax.vmap(lambda key: DiTBlock(c, rngs=nnx.Rngs(params=key)))(keys)
        self.norm = layers.Norm("rmsnorm", width, rngs=rngs, eps=1e-6)
        self.output = linear(width, c.patch_dim, std=0.0)

    def __call__(
        self,
        noisy: Float32[Array, "B H W C"],
        time: Float32[Array, " B"],
        condition: Float32[Array, "B N R"],
    ) -> Float32[Array, "B H W C"]:
        """The prediction, 0 before training.

        Args:
            noisy: images of `image_size` and `num_channels`.
            time: the steps as shares of all steps, 0 to 1.
            condition: standardised vectors.
        """
        c = self.config
        waves = time[:, None] * jnp.exp(jnp.linspace(0, 6, _NUM_WAVES))[None] * math.pi
        step = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], axis=-1)[:, None]
        step = jax.nn.silu(self.step_out(jax.nn.silu(self.step_in(step))))
        read = self.condition_norm(self.condition(condition)) + _whole(self.slots)
        x = self.patches(_to_patches(noisy, c.patch_size)) + _whole(self.positions)

        def layer(x: jax.Array, block: DiTBlock) -> tuple[jax.Array, None]:
            return block(x, step, read), None

        x, _ = jax.lax.scan(block.REMAT[c.remat](layer), x, self.blocks)
        return _to_images(self.output(self.norm(x)), c.patch_size)


@sharding.automatic("batch")
def _to_patches(images: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B P V"]:
    """Square images as patches in raster order."""
    patches = conv.space_to_depth(images, patch_size)
    return patches.reshape(len(images), -1, patches.shape[-1])


@sharding.automatic("batch")
def _to_images(patches: Float[Array, "B P V"], patch_size: int) -> Float[Array, "B H W C"]:
    """Inverse of `_to_patches`."""
    side = math.isqrt(patches.shape[1])
    return conv.depth_to_space(patches.reshape(len(patches), side, side, -1), patch_size)


def _whole(table: nnx.Param) -> Float[Array, "1 N D"]:
    """A table of positions on every device, for all images."""
    return sharding.gather(table[...], (None, None))[None]
