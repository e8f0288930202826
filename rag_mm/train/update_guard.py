"""Skips updates whose loss or gradient is non-finite or whose loss is an outlier.

It is an Optax transformation, so its history is part of the optimizer state: it is saved and restored, and a
step stays a pure function of its inputs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When an update is skipped, and when a run gives up.

    Attributes:
        window: number of accepted losses to compare with; before there are as many, nothing is a spike.
        sigmas: a loss more than this many standard deviations above their mean is a spike.
        max_in_a_row: this many consecutive skipped updates end the run.
    """

    window: int = 128
    sigmas: float = 6.0
    max_in_a_row: int = 10

    def __post_init__(self):
        if self.window < 2 or self.sigmas <= 0 or self.max_in_a_row < 1:
            raise ValueError(
                "a guard's window is at least 2, its sigmas above 0, its max_in_a_row at least 1, not "
                f"{self.window}, {self.sigmas} and {self.max_in_a_row}"
            )


class GuardState(NamedTuple):
    """Accepted losses (float32 [window], a ring buffer), counts (int32 []), and the inner state."""

    losses: jax.Array
    num_accepted: jax.Array
    num_skipped: jax.Array
    num_in_a_row: jax.Array
    inner: optax.OptState


def guard(
    inner: optax.GradientTransformation, config: GuardConfig
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner`: a skipped step gives a zero update and leaves the inner state unchanged.

    `update` takes the step's loss as `value`. The inner update runs inside `lax.cond`; selecting between
    the old and the new state leaf by leaf would copy the donated state.
    """

    def init(params: optax.Params) -> GuardState:
        count = jnp.zeros((), jnp.int32)
        losses = jnp.zeros(config.window, jnp.float32)
        return GuardState(losses, count, count, count, inner.init(params))

    def update(
        grads: optax.Updates,
        state: GuardState,
        params: optax.Params | None = None,
        *,
        value: jax.Array,
        **_: Any,
    ) -> tuple[optax.Updates, GuardState]:
        is_good = jnp.isfinite(value) & jnp.isfinite(optax.global_norm(grads))
        is_good &= ~_is_spike(value, state, config)
        apply = lambda: inner.update(grads, state.inner, params)
        abstract = jax.eval_shape(inner.update, grads, state.inner, params)[0]
        skip = lambda: (
            jax.tree.map(lambda grad, leaf: jnp.zeros_like(grad, leaf.dtype), grads, abstract),
            state.inner,
        )
        updates, new_inner = jax.lax.cond(is_good, apply, skip)
        slot = state.num_accepted % config.window
        losses = jnp.where(is_good, state.losses.at[slot].set(value), state.losses)
        num_good = is_good.astype(jnp.int32)
        counts = (
            state.num_accepted + num_good,
            state.num_skipped + 1 - num_good,
            jnp.where(is_good, 0, state.num_in_a_row + 1),
        )
        return updates, GuardState(losses, *counts, new_inner)

    return optax.GradientTransformationExtraArgs(init, update)


def blank_skipped(
    before: optax.OptState, after: optax.OptState, metrics: dict[str, tuple[jax.Array, jax.Array]]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The step's metric sums; sums and weights are zero if its update was skipped, so averages exclude it."""
    if not isinstance(before, GuardState) or not isinstance(after, GuardState):
        return metrics
    is_skipped = after.num_skipped > before.num_skipped
    return jax.tree.map(lambda x: jnp.where(is_skipped, jnp.zeros_like(x), x), metrics)


def counts(opt_state: optax.OptState) -> tuple[int, int]:
    """(updates skipped so far, consecutive skipped updates up to now); zeros without a guard.

    With several objectives the sum, and the largest of the runs.
    """
    is_guard = lambda node: isinstance(node, GuardState)
    guards = [node for node in jax.tree.leaves(opt_state, is_leaf=is_guard) if is_guard(node)]
    found = jax.device_get([(each.num_skipped, each.num_in_a_row) for each in guards])
    skipped, in_a_row = ([int(np.asarray(pair[i])) for pair in found] for i in (0, 1))
    return sum(skipped), max(in_a_row, default=0)


def _is_spike(value: jax.Array, state: GuardState, config: GuardConfig) -> jax.Array:
    mean = state.losses.mean()
    # A converged loss varies only by rounding; a spike must exceed the mean by at least 1 %.
    std = jnp.maximum(state.losses.std(), 0.01 * jnp.abs(mean) / config.sigmas)
    return (state.num_accepted >= config.window) & (value > mean + config.sigmas * std)
