"""What small Emus need beside the paper's parts: stored statistics, and codes that are principal components.

Their values are computed once from training images, not learned: parameters without a gradient, which
`fit_statistics` and `fit_components` make.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from rag_mm.core import sharding

# Added to a variance before its root.
VARIANCE_FLOOR = 1e-4


class Statistics(nnx.Module):
    """Mean and standard deviation by place and dimension; 0 and 1 until fitted values are put in."""

    def __init__(self, num: int, dim: int):
        self.mean = nnx.Param(jnp.zeros((num, dim), jnp.float32), axes=(None, None))
        self.std = nnx.Param(jnp.ones((num, dim), jnp.float32), axes=(None, None))

    def __call__(self, x: Float[Array, "B M C"]) -> Float[Array, "B M C"]:
        """x standardised, in its dtype; no gradient in the statistics."""
        mean, std = (jax.lax.stop_gradient(each[...])[None] for each in (self.mean, self.std))
        return ((x.astype(jnp.float32) - mean) / std).astype(x.dtype)


def fit_statistics(
    values: Float[np.ndarray, "B M C"],
) -> dict[str, Float32[np.ndarray, "M C"]]:
    """`mean` and `std` of B images' tokens or codes, for `Statistics`."""
    values = np.asarray(values, np.float32)
    return {"mean": values.mean(0), "std": np.sqrt(values.var(0) + VARIANCE_FLOOR)}


@sharding.automatic("batch")
def standardise(
    codes: Float[Array, "B N R"], is_counted: Bool[Array, " B"]
) -> Float[Array, "B N R"]:
    """Codes minus their mean over the images that count, divided by their deviation; by slot and dimension.

    A gradient passes through mean and deviation, as in batch normalization.
    """
    values, weights = codes.astype(jnp.float32), is_counted.astype(jnp.float32)[:, None, None]
    count = jnp.maximum(weights.sum(), 1)
    centred = values - (values * weights).sum(0, keepdims=True) / count
    variance = (jnp.square(centred) * weights).sum(0, keepdims=True) / count
    return (centred * jax.lax.rsqrt(variance + VARIANCE_FLOOR)).astype(codes.dtype)


class Components(nnx.Module):
    """Frozen principal components of groups of 2x2 patch tokens, one set for each group.

    With a class slot the first group is the class token alone, filled up with zeros.
    """

    def __init__(self, num_groups: int, group_dim: int, dim: int, *, has_class_slot: bool):
        self.has_class_slot = has_class_slot
        zeros = jnp.zeros((num_groups, group_dim), jnp.float32)
        self.mean = nnx.Param(zeros, axes=(None, None))
        eye = jnp.eye(group_dim, dim, dtype=jnp.float32)
        kernel = jnp.broadcast_to(eye[None], (num_groups, group_dim, dim))
        self.kernel = nnx.Param(kernel, axes=(None, None, None))

    def __call__(self, tokens: Float[Array, "B M C"]) -> Float[Array, "B N R"]:
        """The components of an image's groups, in its tokens' dtype; no gradient in mean and kernel."""

        @sharding.automatic("batch")
        def reduce(tokens: jax.Array, mean: jax.Array, kernel: jax.Array) -> jax.Array:
            groups = group(jnp, tokens.astype(jnp.float32), self.has_class_slot)
            return jnp.einsum("bng,ngr->bnr", groups - mean[None], kernel)

        mean, kernel = (jax.lax.stop_gradient(each[...]) for each in (self.mean, self.kernel))
        return reduce(tokens, mean, kernel).astype(tokens.dtype)


def fit_components(
    tokens: Float[np.ndarray, "B M C"], dim: int, has_class_slot: bool
) -> dict[str, Float32[np.ndarray, "..."]]:
    """`mean` and `kernel` for `Components`: the `dim` first principal components of each group.

    They are divided by one number a group, so that their mean variance is 1, but are not whitened: whitened,
    most of what a model must predict would be noise.

    Args:
        tokens: of B images, at least two.
        dim: R.
        has_class_slot: whether the class token is the first group.
    """
    groups = group(np, np.asarray(tokens, np.float32), has_class_slot)
    mean, kernels = groups.mean(0), []
    for each in np.moveaxis(groups - mean, 1, 0):
        variances, directions = np.linalg.eigh(each.T @ each / len(each))
        variances, directions = variances[::-1][:dim], directions[:, ::-1][:, :dim]
        kernels.append(directions / np.sqrt(variances.mean() + 1e-12))
    return {"mean": mean, "kernel": np.stack(kernels).astype(np.float32)}


def group(xp, tokens, has_class_slot: bool):  # type: ignore[no-untyped-def]
    """Tokens [B, 1 + S * S, C] as groups [B, N, 4 C] of 2x2 patches, in raster order.

    Args:
        xp: numpy or jax.numpy.
        tokens: an array of that module.
        has_class_slot: whether the class token, filled up with zeros, is the first group.
    """
    batch, num, width = tokens.shape
    half = round((num - 1) ** 0.5) // 2
    squares = tokens[:, 1:].reshape(batch, half, 2, half, 2, width)
    groups = squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, half * half, 4 * width)
    if not has_class_slot:
        return groups
    first = xp.pad(tokens[:, :1], ((0, 0), (0, 0), (0, 3 * width)))
    return xp.concatenate([first, groups], axis=1)


@sharding.automatic()
def spread(
    codes: Float[Array, "B N R"], is_counted: Bool[Array, " B"]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Variance between images, a mean over slots and dimensions, and participation ratio.

    The ratio is (sum of eigenvalues)^2 / sum of squared eigenvalues of the codes' covariance: about the
    number of directions in which images differ. It is at most the number of images that count, less one.
    """
    weights = is_counted.astype(jnp.float32)[:, None]
    values = codes.astype(jnp.float32).reshape(codes.shape[0], -1)
    count = jnp.maximum(weights.sum(), 1)
    centred = (values - (values * weights).sum(0, keepdims=True) / count) * weights
    gram = centred @ centred.T
    total = jnp.trace(gram)
    ratio = total**2 / jnp.maximum(jnp.square(gram).sum(), 1e-30)
    return total / (count * values.shape[1]), ratio
