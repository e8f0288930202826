"""Convolutional parts of image tokenizers: MAGVIT's 2D residual blocks, as used by SPAE."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from rag_mm.core import sharding
from rag_mm.core.errors import UserError

_LECUN = nnx.initializers.lecun_normal()
_SMALL = 16  # Up to this many rows or columns XLA's own gradient of a kernel is as fast on a CPU.


def conv3x3(
    in_dim: int,
    out_dim: int,
    *,
    use_bias: bool = True,
    kernel_init: nnx.Initializer = _LECUN,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A 3x3 convolution that preserves height and width."""
    return nnx.Conv(
        in_dim,
        out_dim,
        (3, 3),
        use_bias=use_bias,
        kernel_init=kernel_init,
        conv_general_dilated=_as_flax_calls_it,
        rngs=rngs,
    )


def convolve3x3(
    x: Float[Array, "B H W in_dim"], kernel: Float[Array, "3 3 in_dim out_dim"]
) -> Float[Array, "B H W out_dim"]:
    """x, padded by zeros, convolved by a kernel; its gradient is one that the platform computes fast."""
    if sharding.platform() == "cpu" and min(x.shape[1:3]) > _SMALL:
        return _convolve_on_cpu(x, kernel)
    return _convolve(x, kernel)


def _as_flax_calls_it(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    del args, options  # Those of a 3x3 convolution of one group, with neither stride nor dilation.
    return convolve3x3(x, kernel)


def _convolve(x: Array, kernel: Array) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


@jax.custom_vjp
def _convolve_on_cpu(
    x: Float[Array, "B H W in_dim"], kernel: Float[Array, "3 3 in_dim out_dim"]
) -> Float[Array, "B H W out_dim"]:
    return _convolve(x, kernel)


def _keep_inputs(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve_on_cpu(x, kernel), (x, kernel)


def _gradients(inputs: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    """Of x and of the kernel, whose gradient is three matrix products over all positions.

    XLA treats that gradient as a convolution by a kernel of the size of the image, at a fifth of the speed.
    """
    x, kernel = inputs
    (_, height, width, in_dim), out_dim = x.shape, slope.shape[-1]
    to_x = _convolve_on_cpu(slope, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    by_row = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    by_column = jnp.pad(slope, ((0, 0), (0, 0), (1, 1), (0, 0)))
    slopes = jnp.concatenate(
        [by_column[:, :, 2 - j : 2 - j + width] for j in range(3)], axis=-1
    ).reshape(-1, 3 * out_dim)
    rows = [jnp.matmul(by_row[:, i : i + height].reshape(-1, in_dim).T, slopes) for i in range(3)]
    to_kernel = jnp.stack(rows).reshape(3, in_dim, 3, out_dim).swapaxes(1, 2)
    return to_x, to_kernel


_convolve_on_cpu.defvjp(_keep_inputs, _gradients)


class ImageNorm(nnx.GroupNorm):
    """Flax's GroupNorm, computed by channel for large images, which halves its time on a CPU."""

    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        if min(x.shape[1:3]) <= _SMALL:
            return super().__call__(x)
        return group_normalize(x, self.scale[...], self.bias[...], self.num_groups, self.epsilon)


def group_norm(width: int, *, rngs: nnx.Rngs) -> ImageNorm:
    """GroupNorm with gcd(width, 32) groups; Flax's default is 32."""
    return ImageNorm(width, num_groups=math.gcd(width, 32), rngs=rngs)


def group_normalize(
    x: Float[Array, "B H W D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    num_groups: int,
    epsilon: float,
) -> Float[Array, "B H W D"]:
    """Group normalization (Wu & He 2018), with means in float32; returns x's dtype."""
    (count, rows, columns, dim), size = x.shape, x.shape[-1] // num_groups
    flat = x.astype(jnp.float32).reshape(count, -1, dim)
    sums = jnp.stack([flat.sum(axis=1), (flat**2).sum(axis=1)])
    by_group = sums.reshape(2, count, num_groups, size).mean(axis=-1) / (rows * columns)
    mean, square = jnp.repeat(by_group, size, axis=-1)
    variance = jnp.maximum(square - mean**2, 0)
    factor = jax.lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32)[None]
    shift = bias.astype(jnp.float32)[None] - mean * factor
    return (flat * factor[:, None] + shift[:, None]).reshape(x.shape).astype(x.dtype)


class ResBlock(nnx.Module):
    """Twice norm, swish and 3x3 convolution, plus a skip connection, which is 1x1 if the width changes."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        norm: Callable[..., Any] = group_norm,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        """`norm` makes the norm of a given width, called as `norm(x, *condition)`; `use_bias` is for
        convolutions and skip.
        """
        self.norm1 = norm(in_dim, rngs=rngs)
        self.conv1 = conv3x3(in_dim, out_dim, use_bias=use_bias, rngs=rngs)
        self.norm2 = norm(out_dim, rngs=rngs)
        self.conv2 = conv3x3(out_dim, out_dim, use_bias=use_bias, rngs=rngs)
        skip = partial(nnx.Linear, in_dim, out_dim, use_bias=use_bias, rngs=rngs)
        self.skip = None if in_dim == out_dim else skip()

    def __call__(
        self, x: Float[Array, "B H W in_dim"], *condition: Array
    ) -> Float[Array, "B H W out_dim"]:
        h = self.conv1(nnx.silu(self.norm1(x, *condition)))
        h = self.conv2(nnx.silu(self.norm2(h, *condition)))
        return h + (x if self.skip is None else self.skip(x))


class PointwiseBlock(nnx.Module):
    """A residual MLP applied to each position separately; initially the identity."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        # LayerNorm, since GroupNorm's statistics would mix positions.
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(
            2 * width, width, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        return x + self.down(nnx.silu(self.up(self.norm(x))))


def average_pool(x: Float[Array, "B H W D"]) -> Float[Array, "B H//2 W//2 D"]:
    """Halves height and width by 2x2 means."""
    b, h, w, d = x.shape  # nnx.avg_pool divides by an integer, which strict promotion forbids.
    return x.reshape(b, h // 2, 2, w // 2, 2, d).mean(axis=(2, 4))


def upsample_nearest(x: Float[Array, "B H W D"]) -> Float[Array, "B 2*H 2*W D"]:
    """Doubles height and width."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def space_to_depth(
    x: Num[Array, "B H W D"], patch: int
) -> Num[Array, "B H//{patch} W//{patch} D*{patch**2}"]:
    """Folds square patches into channels.

    Raises:
      UserError: patch does not divide height and width.
    """
    b, h, w, d = x.shape
    if h % patch or w % patch:
        raise UserError(f"a {h}x{w} image cannot be cut into {patch}-pixel patches: resize it.")
    x = x.reshape(b, h // patch, patch, w // patch, patch, d)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, -1)


def depth_to_space(
    x: Num[Array, "B h w channels"], patch: int
) -> Num[Array, "B h*{patch} w*{patch} channels//{patch**2}"]:
    """Inverse of `space_to_depth`."""
    b, h, w, d = x.shape
    x = x.reshape(b, h, w, patch, patch, d // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, -1)
