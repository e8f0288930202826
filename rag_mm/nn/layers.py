"""Basic modules: linear maps, norms and embeddings, whose parameters have logical axes in their metadata."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int

from rag_mm.core import sharding
from rag_mm.ops import projection

Axes = tuple[str | None, ...]
NORMS = ("layernorm", "layernorm_no_params", "rmsnorm")


def make_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, std: float, cut: float | None = None
) -> nnx.Param:
    """A float32 parameter sampled from N(0, std^2), truncated at `cut` std, with its logical axes."""
    key = rngs.params()
    if cut is None:
        value = jax.random.normal(key, shape, jnp.float32)
    else:
        value = jax.random.truncated_normal(key, -cut, cut, shape, jnp.float32)
    return nnx.Param(std * value, axes=axes)


class Linear(nnx.Module):
    """y[b, t, *out] = sum over `in` of x[b, t, *in] kernel[*in, *out] (+ bias[*out])."""

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: Axes,
        *,
        use_bias: bool,
        rngs: nnx.Rngs,
        std: float | None = None,
        cut: float | None = None,
    ):
        """`axes` are those of `in`, then those of `out`; `std` defaults to 1 / sqrt(fan in)."""
        self.num_in = len(in_shape)
        std = 1 / math.sqrt(math.prod(in_shape)) if std is None else std
        self.kernel = make_param(rngs, (*in_shape, *out_shape), axes, std, cut)
        zeros = jnp.zeros(out_shape, jnp.float32)
        self.bias = nnx.Param(zeros, axes=axes[self.num_in :]) if use_bias else None

    def __call__(self, x: Float[Array, "B T *in"]) -> Float[Array, "B T *out"]:
        """Returns x's dtype."""
        y = projection.project(x, self.kernel[...], self.kernel.axes, self.num_in)
        if self.bias is not None:
            bias = sharding.gather(self.bias[...].astype(x.dtype), self.bias.axes)
            y = y + bias[None, None]
        return y


class Norm(nnx.Module):
    """LayerNorm, LayerNorm without parameters (CM3Leon) or RMSNorm (LLaMA), in float32."""

    def __init__(
        self,
        kind: str,
        dim: int,
        *,
        rngs: nnx.Rngs,
        eps: float = 1e-5,
        heads: tuple[int, str] | None = None,
    ):
        """Makes a norm over the last axis.

        Args:
            kind: layernorm | layernorm_no_params | rmsnorm.
            dim: size of the last axis.
            rngs: unused.
            eps: added to the variance.
            heads: number of heads and their logical axis, for separate parameters per head.
        """
        if kind not in NORMS:
            raise ValueError(f"norm is one of {', '.join(NORMS)}, not {kind!r}")
        self.kind, self.eps = kind, eps
        has_scale, has_bias = kind != "layernorm_no_params", kind == "layernorm"
        shape, axes = ((dim,), (None,)) if heads is None else ((heads[0], dim), (heads[1], None))
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32), axes=axes) if has_scale else None
        self.bias = nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes) if has_bias else None

    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """Normalizes the last axis; returns x's dtype."""
        y = x.astype(jnp.float32)
        if self.kind != "rmsnorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * _broadcast(self.scale[...], y)
        if self.bias is not None:
            y = y + _broadcast(self.bias[...], y)
        return y.astype(x.dtype)


def _broadcast(parameter: Float[Array, "*last"], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """The parameter in y's dtype, with leading axes of size 1; imported weights may be bfloat16."""
    lead = (1,) * (y.ndim - parameter.ndim)
    return parameter.astype(y.dtype).reshape(*lead, *parameter.shape)


class Embedding(nnx.Module):
    """A table of vectors, looked up by id; as a tied or untied head, multiplied to give logits."""

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        std: float,
        rngs: nnx.Rngs,
        axes: Axes,
        cut: float | None = None,
    ):
        self.table = make_param(rngs, (size, dim), axes, std, cut)

    def __call__(
        self, ids: Int[Array | np.ndarray, "B T"], dtype: DTypeLike
    ) -> Float[Array, "B T D"]:
        """Looks up ids; returns `dtype`."""
        return projection.look_up(ids, self.table[...], dtype)

    def attend(self, x: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Products of x with all vectors; the table is cast to x's dtype, the sums are float32."""
        table, (rows, width) = self.table[...], self.table.axes
        return projection.project(
            x, projection.transpose(table), (width, rows), 1, out_dtype=jnp.float32
        )


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}
