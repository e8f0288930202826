"""Compares a model's loss and gradients in bfloat16, with every block recomputed, with the exact ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx


def assert_near(
    make_model: Callable[..., nnx.Module],
    params: Any,
    loss_fn: Callable[[Any], jax.Array],
    bound: float,
) -> None:
    """They are float32, differ, and by less than `bound` of the exact norm.

    `make_model` takes `dtype` and `remat`, `params` are of any of its models, `loss_fn` is of a model.
    """

    def compute(**scale: str) -> Any:
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(**scale)))
        loss = lambda params: loss_fn(nnx.merge(graphdef, params))
        with jax.numpy_dtype_promotion("standard"):  # jax's own attention mixes dtypes backward.
            return jax.jit(jax.value_and_grad(loss))(params)

    exact, scaled = compute(), compute(dtype="bfloat16", remat="full")
    assert {leaf.dtype for leaf in jax.tree.leaves(scaled)} == {jnp.dtype("float32")}
    difference = optax.global_norm(jax.tree.map(jnp.subtract, exact, scaled))
    assert 0 < difference < bound * optax.global_norm(exact)
