"""StyleGAN's discriminator of images (Karras et al. 2020, arXiv 1912.04958) as in MAGVIT's 2D tokenizer.

A 3x3 convolution; residual blocks, each of which halves height and width; a 3x3 convolution and two linear
maps over the whole image. No normalization, so that no image's logit depends on the others in its batch.
"""

import dataclasses
import math

import jax
from flax import nnx
from jaxtyping import Array, Float, Float32

from rag_mm.core import checks
from rag_mm.core.errors import UserError
from rag_mm.nn import conv

_SLOPE = 0.2  # of the activation below 0


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; the defaults are MAGVIT's large model.

    Attributes:
        width: channels before the first block.
        width_multipliers: channels of each block, in units of `width`; each block halves the image.
    """

    width: int = 128
    width_multipliers: tuple[int, ...] = (2, 4, 4, 4, 4)

    def __post_init__(self):
        checks.at_least(self, 1, "width")
        scales = self.width_multipliers
        if not 1 <= len(scales) <= checks.MAX_BLOCKS or min(scales) < 1:
            raise ValueError(
                f"width_multipliers is {scales}; give 1 to {checks.MAX_BLOCKS} of at least 1"
            )

    def final_size(self, image_size: int) -> int:
        """Rows of the grid after the last block.

        Raises:
            UserError: the blocks do not divide the image.
        """
        halvings = len(self.width_multipliers)
        if image_size < 1 or image_size % 2**halvings:
            raise UserError(
                f"A discriminator of {halvings} blocks takes images of a multiple of {2**halvings} pixels, "
                f"not {image_size}; give fewer width_multipliers."
            )
        return image_size // 2**halvings


class DownBlock(nnx.Module):
    """Two 3x3 convolutions with a 2x2 mean between them, beside a 1x1 skip of the mean of the input."""

    def __init__(self, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv3x3(in_dim, in_dim, rngs=rngs)
        self.conv2 = _conv3x3(in_dim, out_dim, rngs=rngs)
        self.skip = _linear(in_dim, out_dim, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W in_dim"]) -> Float[Array, "B H//2 W//2 out_dim"]:
        h = conv.average_pool(_activate(self.conv1(x)))
        h = _activate(self.conv2(h))
        return (h + self.skip(conv.average_pool(x))) / math.sqrt(2)


class Discriminator(nnx.Module):
    """Images of one size to logits: high for images of the data, low for reconstructions."""

    def __init__(self, config: DiscriminatorConfig, image_size: int, *, rngs: nnx.Rngs):
        side, width = config.final_size(image_size), config.width
        self.stem = _conv3x3(3, width, rngs=rngs)
        blocks = []
        for multiplier in config.width_multipliers:
            blocks.append(DownBlock(width, config.width * multiplier, rngs=rngs))
            width = config.width * multiplier
        self.blocks = nnx.List(blocks)
        self.last = _conv3x3(width, width, rngs=rngs)
        self.hidden = _linear(width * side**2, width, rngs=rngs)
        self.to_logit = _linear(width, 1, rngs=rngs)

    def __call__(self, images: Float32[Array, "B H W 3"]) -> Float32[Array, " B"]:
        """One logit per image; images are RGB in 0..1, reconstructions may leave that range."""
        h = _activate(self.stem(images))
        for block in self.blocks:
            h = block(h)
        h = _activate(self.last(h))
        return self.to_logit(_activate(self.hidden(h.reshape(h.shape[0], -1))))[:, 0]


def _activate(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.leaky_relu(x, _SLOPE)


def _conv3x3(in_dim: int, out_dim: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    init = nnx.initializers.xavier_uniform()
    return conv.conv3x3(in_dim, out_dim, kernel_init=init, rngs=rngs)


def _linear(in_dim: int, out_dim: int, *, use_bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.xavier_uniform()
    return nnx.Linear(in_dim, out_dim, use_bias=use_bias, kernel_init=init, rngs=rngs)
