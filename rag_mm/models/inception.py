"""The Inception whose features the FID compares (Szegedy et al. 2016, arXiv 1512.00567; Heusel et al. 2017).

It is the network of 2015, as pytorch-fid has it: unlike torchvision's, its mean poolings leave padding out,
and the last block has a maximum pooling. The network is a function of the convolutions that it is given.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

_SIZE = 299
_EPS = 1e-3
Tensors = Mapping[str, jax.Array]
Layer = Callable[..., jax.Array]  # As `conv` in `features`.


@runtime_checkable
class Convolve(Protocol):
    """A convolution by name, with its norm and ReLU."""

    def __call__(
        self, name: str, x: jax.Array, kernel: tuple[int, int], stride: int, padding: str
    ) -> jax.Array:
        """[B, H, W, C] to [B, H', W', C']; `kernel` is its height and width."""


def convolve_with(tensors: Tensors) -> Convolve:
    """The convolutions of tensors under pytorch-fid's names, in its layout.

    Their kernels decide the widths; a tensor that is missing or of another shape raises KeyError,
    TypeError or ValueError when the network is run.
    """

    def convolve(
        name: str, x: jax.Array, kernel: tuple[int, int], stride: int, padding: str
    ) -> jax.Array:
        weight = tensors[f"{name}.conv.weight"].transpose(2, 3, 1, 0)
        if weight.shape[:2] != kernel:
            raise ValueError(f"{name} has kernels of {weight.shape[:2]} in place of {kernel}")
        strides, layout = (stride, stride), ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, weight, strides, padding, dimension_numbers=layout)
        parts = ("weight", "bias", "running_mean", "running_var")
        scale, bias, mean, var = (tensors[f"{name}.bn.{part}"][None, None, None] for part in parts)
        return jax.nn.relu((y - mean) * (scale * jax.lax.rsqrt(var + _EPS)) + bias)

    return convolve


def features(convolve: Convolve, images: Float[Array, "B H W 3"]) -> Float32[Array, "B D"]:
    """Pooled features, D = 2048 with the public weights, of images in 0..1 of any size."""

    def conv(
        name: str,
        x: jax.Array,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        padding: str = "",
    ) -> jax.Array:
        return convolve(name, x, kernel, stride, padding or ("VALID" if stride > 1 else "SAME"))

    batch, _, _, channels = images.shape
    x = jax.image.resize(images, (batch, _SIZE, _SIZE, channels), "linear", antialias=False)
    x = conv("Conv2d_1a_3x3", 2 * x - 1, (3, 3), 2)
    x = conv("Conv2d_2a_3x3", x, (3, 3), padding="VALID")
    x = conv("Conv2d_2b_3x3", x, (3, 3))
    x = conv("Conv2d_3b_1x1", _max(x, 2))
    x = _max(conv("Conv2d_4a_3x3", x, (3, 3), padding="VALID"), 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = _block_a(conv, block, x)
    x = _block_b(conv, "Mixed_6a", x)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = _block_c(conv, block, x)
    x = _block_d(conv, "Mixed_7a", x)
    x = _block_e(conv, "Mixed_7b", x, _mean(x))
    x = _block_e(conv, "Mixed_7c", x, _max(x, 1, "SAME"))
    return x.mean(axis=(1, 2))


def _chain(
    conv: Layer,
    block: str,
    branch: str,
    x: jax.Array,
    kernels: Sequence[tuple[int, int]],
    last_stride: int = 1,
) -> jax.Array:
    """The convolutions BRANCH_1, BRANCH_2, .. of a block, of these kernels."""
    for i, kernel in enumerate(kernels, start=1):
        stride = last_stride if i == len(kernels) else 1
        x = conv(f"{block}.{branch}_{i}", x, kernel, stride)
    return x


def _block_a(conv: Layer, block: str, x: jax.Array) -> jax.Array:
    parts = [
        conv(f"{block}.branch1x1", x),
        _chain(conv, block, "branch5x5", x, [(1, 1), (5, 5)]),
        _chain(conv, block, "branch3x3dbl", x, [(1, 1), (3, 3), (3, 3)]),
        conv(f"{block}.branch_pool", _mean(x)),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_b(conv: Layer, block: str, x: jax.Array) -> jax.Array:
    parts = [
        conv(f"{block}.branch3x3", x, (3, 3), 2),
        _chain(conv, block, "branch3x3dbl", x, [(1, 1), (3, 3), (3, 3)], 2),
        _max(x, 2),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_c(conv: Layer, block: str, x: jax.Array) -> jax.Array:
    flat, tall = (1, 7), (7, 1)
    parts = [
        conv(f"{block}.branch1x1", x),
        _chain(conv, block, "branch7x7", x, [(1, 1), flat, tall]),
        _chain(conv, block, "branch7x7dbl", x, [(1, 1), tall, flat, tall, flat]),
        conv(f"{block}.branch_pool", _mean(x)),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_d(conv: Layer, block: str, x: jax.Array) -> jax.Array:
    parts = [
        _chain(conv, block, "branch3x3", x, [(1, 1), (3, 3)], 2),
        _chain(conv, block, "branch7x7x3", x, [(1, 1), (1, 7), (7, 1), (3, 3)], 2),
        _max(x, 2),
    ]
    return jnp.concatenate(parts, axis=-1)


def _block_e(conv: Layer, block: str, x: jax.Array, pooled: jax.Array) -> jax.Array:
    once = conv(f"{block}.branch3x3_1", x)
    twice = _chain(conv, block, "branch3x3dbl", x, [(1, 1), (3, 3)])
    parts = [
        conv(f"{block}.branch1x1", x),
        conv(f"{block}.branch3x3_2a", once, (1, 3)),
        conv(f"{block}.branch3x3_2b", once, (3, 1)),
        conv(f"{block}.branch3x3dbl_3a", twice, (1, 3)),
        conv(f"{block}.branch3x3dbl_3b", twice, (3, 1)),
        conv(f"{block}.branch_pool", pooled),
    ]
    return jnp.concatenate(parts, axis=-1)


def _window(
    x: jax.Array, start: float, reduce: Callable[..., jax.Array], stride: int, padding: str
) -> jax.Array:
    return jax.lax.reduce_window(x, start, reduce, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def _max(x: jax.Array, stride: int, padding: str = "VALID") -> jax.Array:
    return _window(x, -jnp.inf, jax.lax.max, stride, padding)


def _mean(x: jax.Array) -> jax.Array:
    """The mean of 3 x 3 neighbors, at the edges of those that there are."""
    return _window(x, 0.0, jax.lax.add, 1, "SAME") / _window(
        jnp.ones_like(x), 0.0, jax.lax.add, 1, "SAME"
    )
