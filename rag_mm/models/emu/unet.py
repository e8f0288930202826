"""Stable Diffusion 1.5's U-Net (Rombach et al. 2022), whose cross-attention reads Emu's codes.

Residual blocks with the step's embedding and transformers on grids of falling size, a middle, and the way
back up, where each block also reads what a block on the way down made. It computes what diffusers'
`UNet2DConditionModel` does; Emu's differs from the public one in keys' and values' input width only.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from rag_mm.core import checks, sharding
from rag_mm.nn import conv

_TRANSFORMER_EPS, _BLOCK_EPS, _LAYER_EPS = 1e-6, 1e-5, 1e-5
_MAX_PERIOD = 10_000


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are Stable Diffusion 1.5's.

    Attributes:
        image_size: rows and columns of what is denoised; 64 for latents of 512 pixels.
        num_channels: of what is denoised.
        widths: channels of each grid, from fine to coarse; each grid has half the rows of the one before.
        attends: on which grids transformers read the condition; the middle's always does.
        num_res_blocks: residual blocks of each grid on the way down; one more on the way up.
        num_heads: of every attention.
        num_groups: of every group norm.
    """

    image_size: int = 64
    num_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    attends: tuple[bool, ...] = (True, True, True, False)
    num_res_blocks: int = 2
    num_heads: int = 8
    num_groups: int = 32

    def __post_init__(self):
        checks.at_least(self, 1, "image_size", "num_channels", "num_heads", "num_groups")
        checks.between(self, 1, checks.MAX_BLOCKS, "num_res_blocks")
        if not 1 <= len(self.widths) <= checks.MAX_BLOCKS or len(self.attends) != len(self.widths):
            raise ValueError(
                f"attends={self.attends} is not of as many grids as widths={self.widths}"
            )
        for width in self.widths:
            if width < 2 or width % self.num_groups or width % self.num_heads:
                raise ValueError(
                    f"widths={self.widths} are not multiples of num_groups={self.num_groups} and "
                    f"num_heads={self.num_heads}"
                )
        if self.image_size % 2 ** (len(self.widths) - 1):
            raise ValueError(f"image_size={self.image_size} cannot be halved for each of the grids")


class UNetBlock(nnx.Module):
    """Twice norm, swish and convolution, with the step's embedding between, plus a skip connection."""

    def __init__(self, config: UNetConfig, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = _norm(config, in_dim, _BLOCK_EPS, rngs)
        self.conv1 = conv.conv3x3(in_dim, out_dim, rngs=rngs)
        self.step = nnx.Linear(4 * config.widths[0], out_dim, rngs=rngs)
        self.norm2 = _norm(config, out_dim, _BLOCK_EPS, rngs)
        self.conv2 = conv.conv3x3(out_dim, out_dim, rngs=rngs)
        self.skip = None if in_dim == out_dim else nnx.Linear(in_dim, out_dim, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W in_dim"], step: Float[Array, "B E"]
    ) -> Float[Array, "B H W out_dim"]:
        """The grid behind the block; `step` is the step's embedding behind its swish."""
        h = self.conv1(nnx.silu(self.norm1(x))) + self.step(step)[:, None, None]
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.skip is None else self.skip(x))


class UNetAttention(nnx.Module):
    """Attention of a grid's positions to a context of any width, without biases but of the output."""

    def __init__(self, width: int, context_dim: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.q = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.k, self.v = (
            nnx.Linear(context_dim, width, use_bias=False, rngs=rngs) for _ in range(2)
        )
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B P D"], context: Float[Array, "B N C"]
    ) -> Float[Array, "B P D"]:
        """What x reads."""
        split = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        return self.out(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class GridTransformer(nnx.Module):
    """Self-attention, cross-attention and a gated MLP on the positions of a grid, between two linear maps."""

    def __init__(self, config: UNetConfig, width: int, context_dim: int, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, rngs=rngs)
        attention = partial(UNetAttention, num_heads=config.num_heads, rngs=rngs)
        self.norm = _norm(config, width, _TRANSFORMER_EPS, rngs)
        self.into, self.back = linear(width, width), linear(width, width)
        self.attention_norm, self.cross_norm, self.mlp_norm = (
            nnx.LayerNorm(width, epsilon=_LAYER_EPS, rngs=rngs) for _ in range(3)
        )
        self.attention, self.cross_attention = (
            attention(width, width),
            attention(width, context_dim),
        )
        self.up, self.down = linear(width, 8 * width), linear(4 * width, width)

    def __call__(
        self, x: Float[Array, "B H W D"], context: Float[Array, "B N C"]
    ) -> Float[Array, "B H W D"]:
        """The grid behind the transformer."""
        h = self.into(self.norm(x)).reshape(len(x), -1, x.shape[-1])
        own = self.attention_norm(h)
        h = h + self.attention(own, own)
        h = h + self.cross_attention(self.cross_norm(h), context)
        value, gate = jnp.split(self.up(self.mlp_norm(h)), 2, axis=-1)
        h = h + self.down(value * jax.nn.gelu(gate, approximate=False))
        return x + self.back(h.reshape(x.shape))


class Grid(nnx.Module):
    """The blocks of one grid, a transformer after each or none, and the convolution to the next grid."""

    def __init__(
        self,
        blocks: list[UNetBlock],
        transformers: list[GridTransformer],
        change: nnx.Conv | None,
    ):
        self.blocks, self.transformers = nnx.List(blocks), nnx.List(transformers)
        self.change = change

    def apply(
        self, index: int, x: Float[Array, "B H W D"], step: Array, context: Array
    ) -> Float[Array, "B H W out_dim"]:
        """Block `index`, and its transformer."""
        x = self.blocks[index](x, step)
        return self.transformers[index](x, context) if self.transformers else x


class UNet(nnx.Module):
    """Predicts what `NoiseConfig.prediction` says, from noisy latents, their step and a condition."""

    def __init__(self, config: UNetConfig, condition_dim: int, *, rngs: nnx.Rngs):
        """Conditions are vectors of width `condition_dim`, of any number."""
        c = self.config = config
        block = partial(UNetBlock, c, rngs=rngs)
        transformer = partial(GridTransformer, c, context_dim=condition_dim, rngs=rngs)
        first, last = c.widths[0], c.widths[-1]
        self.step_in = nnx.Linear(first, 4 * first, rngs=rngs)
        self.step_out = nnx.Linear(4 * first, 4 * first, rngs=rngs)
        self.stem = conv.conv3x3(c.num_channels, first, rngs=rngs)
        down, kept, previous = [], [first], first
        for index, width in enumerate(c.widths):
            is_last = index == len(c.widths) - 1
            blocks = [block(a, width) for a in [previous] + [width] * (c.num_res_blocks - 1)]
            attends = [transformer(width) for _ in blocks] if c.attends[index] else []
            change = None if is_last else nnx.Conv(width, width, (3, 3), 2, padding=1, rngs=rngs)
            down.append(Grid(blocks, attends, change))
            kept += [width] * (len(blocks) + (not is_last))
            previous = width
        self.down = nnx.List(down)
        self.middle = Grid([block(last, last), block(last, last)], [], None)
        self.middle_transformer = transformer(last)
        up = []
        for index, width in reversed(list(enumerate(c.widths))):
            blocks = []
            for _ in range(c.num_res_blocks + 1):
                blocks.append(block(previous + kept.pop(), width))
                previous = width
            attends = [transformer(width) for _ in blocks] if c.attends[index] else []
            change = conv.conv3x3(width, width, rngs=rngs) if index else None
            up.append(Grid(blocks, attends, change))
        self.up = nnx.List(up)
        self.norm = _norm(c, first, _BLOCK_EPS, rngs)
        self.output = conv.conv3x3(first, c.num_channels, rngs=rngs)

    @sharding.automatic("batch")
    def __call__(
        self,
        noisy: Float32[Array, "B H W C"],
        time: Int[Array, " B"],
        condition: Float32[Array, "B N R"],
    ) -> Float32[Array, "B H W C"]:
        """The prediction.

        Args:
            noisy: latents.
            time: the steps, from 0.
            condition: vectors.
        """
        step = nnx.silu(self.step_in(waves(time, self.config.widths[0])))
        step = nnx.silu(self.step_out(step))
        x = self.stem(noisy)
        kept = [x]
        for grid in self.down:
            for index in range(len(grid.blocks)):
                x = grid.apply(index, x, step, condition)
                kept.append(x)
            if grid.change is not None:
                x = grid.change(x)
                kept.append(x)
        x = self.middle_transformer(self.middle.blocks[0](x, step), condition)
        x = self.middle.blocks[1](x, step)
        for grid in self.up:
            for index in range(len(grid.blocks)):
                x = grid.apply(index, jnp.concatenate([x, kept.pop()], axis=-1), step, condition)
            if grid.change is not None:
                x = grid.change(conv.upsample_nearest(x))
        return self.output(nnx.silu(self.norm(x)))


def waves(time: Int[Array, " B"], width: int) -> Float32[Array, "B width"]:
    """Cosines, then sines of steps, of periods from 2 pi to 2 pi * 10,000."""
    half = width // 2
    rates = jnp.exp(-math.log(_MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = time.astype(jnp.float32)[:, None] * rates[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _norm(config: UNetConfig, width: int, epsilon: float, rngs: nnx.Rngs) -> conv.ImageNorm:
    return conv.ImageNorm(width, num_groups=config.num_groups, epsilon=epsilon, rngs=rngs)
