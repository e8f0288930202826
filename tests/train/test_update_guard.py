"""Bad updates are skipped and counted, and the counts are part of the optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rag_mm.train import optimizer, update_guard

PARAMS = {"kernel": jnp.arange(6.0).reshape(2, 3)}
GRADS = {"kernel": jnp.full((2, 3), 0.5)}
CONFIG = update_guard.GuardConfig(window=4, sigmas=3.0)


def run(losses, grads=None, config=CONFIG):
    """Parameters and state after each loss."""
    inner = optax.adam(0.1)
    guarded = update_guard.guard(inner, config)

    @jax.jit
    def step(params, state, grads, value):
        updates, state = guarded.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state, seen = PARAMS, guarded.init(PARAMS), []
    for i, loss in enumerate(losses):
        step_grads = GRADS if grads is None else grads[i]
        with jax.numpy_dtype_promotion("standard"):
            params, state = step(params, state, step_grads, jnp.float32(loss))
        seen.append((params, state))
    return seen


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.0], ids=str)
def test_a_bad_loss_changes_neither_parameters_nor_moments(bad):
    before, after = run([1.0, 1.1, 0.9, 1.0, bad])[3:]
    assert_same(after[0], before[0])
    assert_same(after[1].inner, before[1].inner)
    assert_same(after[1].losses, before[1].losses)
    assert update_guard.counts(after[1]) == (1, 1) and update_guard.counts(before[1]) == (0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_non_finite_gradient_is_skipped(bad):
    poisoned = {"kernel": GRADS["kernel"].at[1, 2].set(bad)}
    before, after = run([1.0, 1.0], [GRADS, poisoned])
    assert_same(after[0], before[0])
    assert update_guard.counts(after[1]) == (1, 1)


def test_good_steps_equal_those_of_the_inner_optimizer():
    losses = [5.0, 4.0, 3.0, 2.5, 2.4, 2.6]
    inner, params = optax.adam(0.1), PARAMS
    state = inner.init(params)
    for found, _ in run(losses):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = inner.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(found["kernel"], params["kernel"], rtol=1e-6)


def test_a_skipped_batch_has_no_effect_on_later_steps():
    with_skip = run([1.0, 1.1, 0.9, 1.0, np.nan, 1.05])[-1]
    without = run([1.0, 1.1, 0.9, 1.0, 1.05])[-1]
    assert_same(with_skip[0], without[0])
    assert update_guard.counts(with_skip[1]) == (1, 0)


def test_no_spike_before_the_window_is_full_nor_for_a_lower_loss():
    assert update_guard.counts(run([1.0, 50.0, 1.0])[-1][1]) == (0, 0)
    assert update_guard.counts(run([1.0, 1.1, 0.9, 1.0, 0.01])[-1][1]) == (0, 0)


def test_a_converged_loss_may_vary_by_one_percent():
    assert update_guard.counts(run([2.0] * 4 + [2.015])[-1][1]) == (0, 0)
    assert update_guard.counts(run([2.0] * 4 + [2.03])[-1][1]) == (1, 1)


def test_skipped_steps_have_zero_weight_in_averages():
    (_, before), (_, after) = run([1.0, np.nan])
    sums = {"loss": (jnp.float32(np.nan), jnp.float32(3))}
    blank = update_guard.blank_skipped(before, after, sums)
    assert [float(x) for x in blank["loss"]] == [0, 0]
    kept = update_guard.blank_skipped(before, before, sums)
    assert np.isnan(kept["loss"][0]) and kept["loss"][1] == 3


def test_make_optimizer_takes_a_guard():
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(warmup_steps=0), 9, CONFIG)
    state = tx.init(PARAMS)
    assert isinstance(state, update_guard.GuardState) and state.losses.shape == (4,)
    assert update_guard.counts(
        optimizer.make_optimizer(optimizer.OptimizerConfig(), 9).init(PARAMS)
    ) == (
        0,
        0,
    )


def test_invalid_guard_settings_are_refused():
    for options in (dict(window=1), dict(sigmas=0.0), dict(max_in_a_row=0)):
        with pytest.raises(ValueError, match="guard"):
            update_guard.GuardConfig(**options)


def test_no_second_copy_of_the_state_is_made():
    """The guard may store at most one more array of a parameter's size; a copy of the state takes three."""
    big = {"kernel": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
    sizes = []
    for tx in (optax.adam(0.1), update_guard.guard(optax.adam(0.1), CONFIG)):
        state = jax.eval_shape(tx.init, big)

        def step(params, state, grads, value, tx=tx):
            updates, state = optax.with_extra_args_support(tx).update(
                grads, state, params, value=value
            )
            return optax.apply_updates(params, updates), state

        with jax.numpy_dtype_promotion("standard"):
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
                big, state, big, jax.ShapeDtypeStruct((), jnp.float32)
            )
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < sizes[0] + 1.5 * 4 * 256 * 1024
