"""Updates that would harm are left out: a loss or gradient that is no number, or a loss that jumps.

An Optax transformation, so its memory is part of the optimizer's state: saved, restored and, like everything
in a step, decided by the step's inputs alone.
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
        window: accepted losses that are remembered; until there are as many, nothing is a spike.
        sigmas: a loss further above their mean than so many of their standard deviations is a spike.
        max_in_a_row: so many skipped updates one after the other end the run.
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


class State(NamedTuple):
    """Accepted losses (float32 [window], oldest overwritten), counts (int32 []), and the inner state."""

    losses: jax.Array
    num_accepted: jax.Array
    num_skipped: jax.Array
    num_in_a_row: jax.Array
    inner: optax.OptState


def guard(
    inner: optax.GradientTransformation, config: GuardConfig
) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose update and state stay as they were wherever a step is skipped.

    Its `update` wants the step's loss as `value`. The inner one runs in a branch of the program: to choose
    between its old and new state leaf by leaf took copies, where the state is donated.
    """

    def init(params: optax.Params) -> State:
        count = jnp.zeros((), jnp.int32)
        losses = jnp.zeros(config.window, jnp.float32)
        return State(losses, count, count, count, inner.init(params))

    def update(
        grads: optax.Updates,
        state: State,
        params: optax.Params | None = None,
        *,
        value: jax.Array,
        **_: Any,
    ) -> tuple[optax.Updates, State]:
        is_good = jnp.isfinite(value) & jnp.isfinite(optax.global_norm(grads))
        is_good &= ~_is_spike(value, state, config)
        take = lambda: inner.update(grads, state.inner, params)
        kinds = jax.eval_shape(inner.update, grads, state.inner, params)[0]
        leave = lambda: (
            jax.tree.map(lambda grad, kind: jnp.zeros_like(grad, kind.dtype), grads, kinds),
            state.inner,
        )
        updates, new = jax.lax.cond(is_good, take, leave)
        at = state.num_accepted % config.window
        accepted = jnp.where(is_good, state.losses.at[at].set(value), state.losses)
        one = is_good.astype(jnp.int32)
        counts = (
            state.num_accepted + one,
            state.num_skipped + 1 - one,
            jnp.where(is_good, 0, state.num_in_a_row + 1),
        )
        return updates, State(accepted, *counts, new)

    return optax.GradientTransformationExtraArgs(init, update)


def blank_skipped(
    before: optax.OptState, after: optax.OptState, metrics: dict[str, tuple[jax.Array, jax.Array]]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The step's sums, zero with weight zero where its update was skipped, so that no average sees them."""
    if not isinstance(before, State) or not isinstance(after, State):
        return metrics
    is_skipped = after.num_skipped > before.num_skipped
    return jax.tree.map(lambda x: jnp.where(is_skipped, jnp.zeros_like(x), x), metrics)


def counts(opt_state: optax.OptState) -> tuple[int, int]:
    """Updates skipped so far, and how many of them are the last ones in a row; zeros without a guard."""
    if not isinstance(opt_state, State):
        return 0, 0
    found = jax.device_get((opt_state.num_skipped, opt_state.num_in_a_row))
    return int(np.asarray(found[0])), int(np.asarray(found[1]))


def _is_spike(value: jax.Array, state: State, config: GuardConfig) -> jax.Array:
    mean = state.losses.mean()
    # A loss that has settled spreads by rounding alone; a jump is at least a hundredth of it.
    spread = jnp.maximum(state.losses.std(), 0.01 * jnp.abs(mean) / config.sigmas)
    return (state.num_accepted >= config.window) & (value > mean + config.sigmas * spread)
