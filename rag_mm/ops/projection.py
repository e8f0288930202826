"""Products of activations, possibly bfloat16, with float32 parameters sharded over the mesh.

A parameter is cast before it is gathered, so that FSDP communicates the narrow form. Its gradient is summed
in float32 and returned in the parameter's sharding: it is reduce-scattered and never stored whole.
"""

import string
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from rag_mm.core import sharding

Axes = tuple[str | None, ...]


def project(
    x: Float[Array, "B T *in"],
    kernel: Float[Array, "*in_out"],
    axes: Axes,
    num_in: int,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "B T *out"]:
    """y[b, t, *out] = sum over `in` of x[b, t, *in] kernel[*in, *out].

    Args:
        x: activations, float32 or bfloat16.
        kernel: the parameter, shape (*in, *out); cast to x's dtype.
        axes: the kernel's logical axes.
        num_in: how many of the kernel's axes are `in`.
        out_dtype: dtype of the sums and of y; None is x's. The gradient of y is rounded to x's dtype.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    # If the dtypes are equal, plain autodiff does the same.
    function = _forward if kernel.dtype == x.dtype == out_dtype else _project
    return function(x, kernel, axes, num_in, out_dtype)


def transpose(table: Float[Array, "V D"]) -> Float[Array, "D V"]:
    """`table.T`; on a CPU its gradient is computed as [D, V] and then transposed.

    By default XLA computes it as [V, D], for which a CPU has to transpose the far larger gradient of the
    logits. Not on a TPU: it would sum the transposed gradient over chips once per chunk of positions instead
    of once.
    """
    return _transpose(table) if sharding.platform() == "cpu" else table.T


@jax.custom_vjp
def _transpose(table: Float[Array, "V D"]) -> Float[Array, "D V"]:
    return table.T


_transpose.defvjp(
    lambda table: (table.T, None),
    lambda _, grad: (jax.lax.optimization_barrier(grad).T,),
)


def look_up(
    ids: Int[Array | np.ndarray, "B T"], table: Float[Array, "V D"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """`table[ids]` in `dtype`; the table's logical axes are (any, "embed")."""
    function = _rows if table.dtype == dtype else _look_up
    return function(ids, table, jnp.dtype(dtype))


def _letters(axes: Axes, num_in: int) -> tuple[str, str]:
    letters = string.ascii_lowercase[: len(axes)]
    return letters[:num_in], letters[num_in:]


def _forward(
    x: Float[Array, "B T *in"],
    kernel: Float[Array, "*in_out"],
    axes: Axes,
    num_in: int,
    out_dtype: jnp.dtype,
) -> Float[Array, "B T *out"]:
    into, out = _letters(axes, num_in)
    kernel = sharding.gather(kernel.astype(x.dtype), axes)
    return jnp.einsum(
        f"YZ{into},{into}{out}->YZ{out}",
        *_widened((x, kernel), out_dtype),
        preferred_element_type=out_dtype,
        out_sharding=sharding.activation_spec("batch", None, *axes[num_in:]),
    )


def _widened(operands: tuple[jax.Array, jax.Array], dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """The operands of a product whose sums are `dtype`; on a CPU they are cast to it.

    XLA's CPU backend cannot multiply two bfloat16 arrays with a float32 sum.
    """
    if sharding.platform() != "cpu":
        return operands
    return tuple(operand.astype(dtype) for operand in operands)


_project = jax.custom_vjp(_forward, nondiff_argnums=(2, 3, 4))


def _project_fwd(
    x: Float[Array, "B T *in"],
    kernel: Float[Array, "*in_out"],
    axes: Axes,
    num_in: int,
    out_dtype: jnp.dtype,
) -> tuple[Float[Array, "B T *out"], tuple]:
    # The residual is the sharded parameter, not the gathered one.
    return _forward(x, kernel, axes, num_in, out_dtype), (x, kernel)


def _project_bwd(
    axes: Axes, num_in: int, out_dtype: jnp.dtype, residuals: tuple, grad: Float[Array, "B T *out"]
) -> tuple[Float[Array, "B T *in"], Float[Array, "*in_out"]]:
    del out_dtype
    x, kernel = residuals
    grad = grad.astype(x.dtype)
    into, out = _letters(axes, num_in)
    x_grad = jnp.einsum(
        f"YZ{out},{into}{out}->YZ{into}",
        grad,
        sharding.gather(kernel.astype(x.dtype), axes),
        out_sharding=sharding.activation_spec("batch", None, *axes[:num_in]),
    )
    multiply = partial(
        jnp.einsum, f"YZ{into},YZ{out}->{into}{out}", preferred_element_type=kernel.dtype
    )
    operands = _widened((x, grad), kernel.dtype)
    layouts = [("batch", None, *axes[:num_in]), ("batch", None, *axes[num_in:])]
    return x_grad, sharding.sum_over_batch(multiply, operands, layouts, axes)


_project.defvjp(_project_fwd, _project_bwd)


def _rows(
    ids: Int[Array | np.ndarray, "B T"], table: Float[Array, "V D"], dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    # A lookup may need any row, so the table is gathered over `tensor` too.
    table = sharding.gather(table.astype(dtype), (None, None))
    spec = sharding.activation_spec("batch", None, None)
    return table.at[ids].get(out_sharding=spec) if spec else table[ids]


_look_up = jax.custom_vjp(_rows, nondiff_argnums=(2,))


def _look_up_fwd(
    ids: Int[Array | np.ndarray, "B T"], table: Float[Array, "V D"], dtype: jnp.dtype
) -> tuple[Float[Array, "B T D"], tuple]:
    return _rows(ids, table, dtype), (ids, table)


def _look_up_bwd(
    dtype: jnp.dtype, residuals: tuple, grad: Float[Array, "B T D"]
) -> tuple[None, Float[Array, "V D"]]:
    del dtype
    ids, table = residuals

    def add(ids: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.zeros(table.shape, table.dtype).at[ids].add(grad.astype(table.dtype))

    layouts = [("batch", None), ("batch", None, None)]
    added = sharding.sum_over_batch(add, (ids, grad), layouts, (None, "embed"))
    if jax.sharding.get_abstract_mesh().empty:
        return None, added
    # The table's rows may also be split over `tensor`.
    return None, jax.sharding.reshard(added, jax.typeof(table).sharding.spec)


_look_up.defvjp(_look_up_fwd, _look_up_bwd)
