"""One training step: forward, gradient, update, new state, in that order and nothing else."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import optax
from flax import nnx

from rag_mm.train.state import TrainState

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
) -> tuple[TrainState, Metrics]:
    """Takes one step; randomness depends on `seed` and `state.step` alone.

    Args:
        state: where training stands; its buffers may be donated.
        batch: arrays [B, ...], split over the mesh's batch axes.
        graphdef: the model's structure, beside `state.params`.
        loss_fn: the objective.
        optimizer: an Optax transformation.
        seed: of dropout and sampling inside the loss.

    Returns:
        The next state, and a plain dict name -> (sum, weight): divide outside, after adding up.
    """
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def compute_loss(params):
        return loss_fn(nnx.merge(graphdef, params), batch, rng)

    grads, metrics = jax.grad(compute_loss, has_aux=True)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises Python floats to int32 powers.
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = (optax.global_norm(grads), jax.numpy.float32(1))
    return TrainState(state.step + 1, params, opt_state), metrics


def make_train_step(
    graphdef: nnx.GraphDef, loss_fn: LossFn, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """`train_step` compiled, its state donated."""
    bound = partial(train_step, graphdef=graphdef, loss_fn=loss_fn, optimizer=optimizer, seed=seed)
    return jax.jit(bound, donate_argnums=0)
