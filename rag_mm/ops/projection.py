"""Products with parameters that rest in float32, split over the mesh, while activations may be narrower.

The parameter is cast before it is gathered, so that FSDP moves the narrow form; its gradient is summed in
float32 and leaves in the parameter's own layout, so that it is reduce-scattered and never stored whole.
"""

import string
from functools import partial

import jax
import jax.numpy as jnp

from rag_mm.core import sharding

Axes = tuple[str | None, ...]


def project(x: jax.Array, kernel: jax.Array, axes: Axes, num_in: int) -> jax.Array:
    """y[b, t, *out] = sum over `in` of x[b, t, *in] kernel[*in, *out].

    Args:
        x: [B, T, *in], float32 or bfloat16.
        kernel: float32 [*in, *out].
        axes: the kernel's logical axes.
        num_in: how many of them are `in`.

    Returns:
        [B, T, *out] in x's dtype.
    """
    # In one dtype autodiff does the same without our help.
    function = _forward if kernel.dtype == x.dtype else _project
    return function(x, kernel, axes, num_in)


def transpose(table: jax.Array) -> jax.Array:
    """[V, D] -> [D, V], whose gradient is made as [D, V] and then turned on a CPU.

    Left to itself XLA makes it as [V, D], for which a CPU has to turn the far larger gradient of logits. A
    TPU would sum the turned gradient over chips once for each run of positions instead of once.
    """
    return _transpose(table) if sharding.platform() == "cpu" else table.T


@jax.custom_vjp
def _transpose(table: jax.Array) -> jax.Array:
    return table.T


_transpose.defvjp(
    lambda table: (table.T, None),
    lambda _, grad: (jax.lax.optimization_barrier(grad).T,),
)


def look_up(ids: jax.Array, table: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a float32 table [V, D] of axes (any, "embed"): int32 [B, T] -> [B, T, D] in `dtype`."""
    function = _rows if table.dtype == dtype else _look_up
    return function(ids, table, jnp.dtype(dtype))


def _letters(axes: Axes, num_in: int) -> tuple[str, str]:
    letters = string.ascii_lowercase[: len(axes)]
    return letters[:num_in], letters[num_in:]


def _forward(x: jax.Array, kernel: jax.Array, axes: Axes, num_in: int) -> jax.Array:
    into, out = _letters(axes, num_in)
    return jnp.einsum(
        f"YZ{into},{into}{out}->YZ{out}",
        x,
        sharding.gather(kernel.astype(x.dtype), axes),
        out_sharding=sharding.activation_spec("batch", None, *axes[num_in:]),
    )


_project = jax.custom_vjp(_forward, nondiff_argnums=(2, 3))


def _project_fwd(
    x: jax.Array, kernel: jax.Array, axes: Axes, num_in: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The parameter itself is kept, not what was gathered.
    return _forward(x, kernel, axes, num_in), (x, kernel)


def _project_bwd(
    axes: Axes, num_in: int, kept: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
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
    operands = (x, grad)
    if sharding.platform() == "cpu":
        # XLA's CPU has no product of two bfloat16 arrays that adds up in float32.
        operands = (x.astype(kernel.dtype), grad.astype(kernel.dtype))
    layouts = [("batch", None, *axes[:num_in]), ("batch", None, *axes[num_in:])]
    return x_grad, sharding.sum_over_batch(multiply, operands, layouts, axes)


_project.defvjp(_project_fwd, _project_bwd)


def _rows(ids: jax.Array, table: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # A lookup by id needs every row: the table is gathered over `tensor` too.
    table = sharding.gather(table.astype(dtype), (None, None))
    spec = sharding.activation_spec("batch", None, None)
    return table.at[ids].get(out_sharding=spec) if spec else table[ids]


_look_up = jax.custom_vjp(_rows, nondiff_argnums=(2,))


def _look_up_fwd(
    ids: jax.Array, table: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rows(ids, table, dtype), (ids, table)


def _look_up_bwd(
    dtype: jnp.dtype, kept: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[None, jax.Array]:
    del dtype
    ids, table = kept

    def add(ids: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.zeros(table.shape, table.dtype).at[ids].add(grad.astype(table.dtype))

    layouts = [("batch", None), ("batch", None, None)]
    added = sharding.sum_over_batch(add, (ids, grad), layouts, (None, "embed"))
    if jax.sharding.get_abstract_mesh().empty:
        return None, added
    # Rows may be split over `tensor` besides.
    return None, jax.sharding.reshard(added, jax.typeof(table).sharding.spec)


_look_up.defvjp(_look_up_fwd, _look_up_bwd)
