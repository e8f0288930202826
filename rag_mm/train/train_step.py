"""One training step as a pure function: forward, gradient, update, new state."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rag_mm.core import sharding
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.train import update_guard
from rag_mm.train.train_state import TrainState

Metrics = dict[str, tuple[jax.Array, jax.Array]]
# (model, batch, rng) -> (loss float32 [], sums with their weights)
LossFn = Callable[[nnx.Module, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, Metrics]]


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    num_parts: int = 1,
    held: Params | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes one step; randomness depends on `seed` and `state.step` only.

    Args:
        state: the current state; its buffers may be donated.
        batch: arrays [B, ...], sharded over the mesh's batch axes.
        graphdef: the model's structure, to which `state.params` and `held` belong.
        loss_fn: the objective.
        optimizer: an Optax transformation; one that takes `value` gets the loss.
        seed: for dropout and sampling inside the loss.
        num_parts: gradient accumulation: the batch is processed in this many parts, one after the other.
            The gradient is the same if the loss equals its `loss` metric, a sum over examples divided by
            max(weight, 1).
        held: the model's other parameters, which have neither gradient nor optimizer state.

    Returns:
        The next state, and the metrics as name -> (sum, weight); divide after summing over steps.
    """
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def compute_loss(params, part, rng):
        model = nnx.merge(graphdef, param_trees.join(params, held or {}))
        return loss_fn(model, part, rng)

    compute_grads = partial(jax.grad(compute_loss, has_aux=True), state.params)
    with jax.named_scope("gradient"):
        if num_parts == 1:
            grads, metrics = compute_grads(batch, rng)
        else:
            grads, metrics = _accumulate(compute_grads, state.params, batch, rng, num_parts)
    with jax.named_scope("update"):
        with jax.numpy_dtype_promotion("standard"):  # Optax raises Python floats to int32 powers.
            total, weight = metrics["loss"]
            update = optax.with_extra_args_support(optimizer).update
            value = total / jnp.maximum(weight, 1)
            updates, opt_state = update(grads, state.opt_state, state.params, value=value)
        params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = (optax.global_norm(grads), jnp.float32(1))
    metrics = update_guard.blank_skipped(state.opt_state, opt_state, metrics)
    return TrainState(state.step + 1, params, opt_state), metrics


def _accumulate(
    compute_grads: Callable[[Mapping[str, jax.Array], jax.Array], tuple[Params, Metrics]],
    params: Params,
    batch: Mapping[str, jax.Array],
    rng: jax.Array,
    num_parts: int,
) -> tuple[Params, Metrics]:
    """Gradient and metrics of the whole batch; each part's mean gradient is weighted by the part's weight."""
    parts = sharding.split_batch(dict(batch), num_parts)

    def add(total, inputs):
        grads, metrics = compute_grads(*inputs)
        weight = _count(metrics)
        return jax.tree.map(lambda sum_, grad: sum_ + weight * grad, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, (parts, jax.random.split(rng, num_parts)))
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    weight = _count(metrics)
    return jax.tree.map(lambda grad: grad / weight, grads), metrics


def _count(metrics: Metrics) -> jax.Array:
    """What the loss was divided by; computed from summed weights, a part without targets adds nothing."""
    return jnp.maximum(metrics["loss"][1].astype(jnp.float32), 1)


def make_train_step(
    graphdef: nnx.GraphDef,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    seed: int,
    num_parts: int = 1,
) -> jax.stages.Wrapped:
    """`train_step` compiled, with donated state; (state, batch) or, with `held`, (state, batch, held=...)."""
    fixed = dict(graphdef=graphdef, loss_fn=loss_fn, optimizer=optimizer, seed=seed)
    bound = partial(train_step, **fixed, num_parts=num_parts)
    return jax.jit(bound, donate_argnums=0)
