"""Learning-rate schedules step by step, which parameters decay, and gradient clipping."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.models import clip
from rag_mm.nn import decoder, param_trees
from rag_mm.train import optimizer, update_guard


def rates(num_steps, **config):
    schedule = optimizer.make_schedule(
        optimizer.OptimizerConfig(learning_rate=2.0, **config), num_steps
    )
    return np.array([schedule(step) for step in range(num_steps + 1)])


def test_linear_rises_from_zero_and_falls_to_zero_at_the_last_step():
    expected = [0.0, 0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5, 0.0]
    np.testing.assert_allclose(rates(8, warmup_steps=4), expected, atol=1e-6)


def test_cosine_decays_over_half_a_period():
    found = rates(8, warmup_steps=4, schedule="cosine")
    half_period = 1 + np.cos(np.pi * np.arange(5) / 4)
    np.testing.assert_allclose(found[4:], half_period, atol=1e-6)
    np.testing.assert_allclose(found[:5], [0.0, 0.5, 1.0, 1.5, 2.0], atol=1e-6)


def test_constant_stays_at_the_peak():
    assert rates(5, warmup_steps=2, schedule="constant").tolist() == [0, 1, 2, 2, 2, 2]


def test_wsd_is_stable_and_then_decays():
    found = rates(20, warmup_steps=4, schedule="wsd")
    expected = np.interp(np.arange(21), [0, 4, 14, 20], [0.0, 2.0, 2.0, 0.0])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_schedules_may_end_above_zero(schedule):
    found = rates(20, warmup_steps=4, schedule=schedule, end_rate=0.1)
    np.testing.assert_allclose(found[[0, 4, 20]], [0.0, 2.0, 0.2], atol=1e-6)
    half = {"linear": 12, "cosine": 12, "wsd": 17}[schedule]  # the middle of the decay
    assert found[half] == pytest.approx(1.1)
    assert (np.diff(found[4:]) <= 1e-6).all()


@pytest.mark.parametrize("end_rate", [-0.1, 1.5])
def test_an_end_rate_outside_of_zero_to_one_is_refused(end_rate):
    with pytest.raises(ValueError, match="end_rate"):
        optimizer.OptimizerConfig(end_rate=end_rate)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule):
    assert rates(3, warmup_steps=0, schedule=schedule)[0] == 2.0


def test_a_run_shorter_than_the_warm_up_only_rises():
    np.testing.assert_allclose(rates(4, warmup_steps=1500), [0.0, 0.5, 1.0, 1.5, 2.0])


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="'square'"):
        rates(3, schedule="square")


def decayed(make_model):
    """Name -> whether an optimizer that only decays changes the parameter."""
    _, abstract = param_trees.describe(make_model, None)
    ones = jax.tree.map(lambda leaf: np.ones((1,), np.float32), abstract)
    config = optimizer.OptimizerConfig(warmup_steps=0, schedule="constant", weight_decay=0.5)
    tx = optimizer.make_optimizer(config, 1)
    zeros = jax.tree.map(np.zeros_like, ones)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(zeros, tx.init(ones), ones)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(leaf[0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }


def test_decay_applies_to_matrices_and_tables_not_to_norms_biases_and_temperature():
    config = decoder.DecoderConfig(
        8, 1, 8, 2, 8, 8, norm="layernorm", qk_norm=True, use_bias=True, positions="learned"
    )
    found = decayed(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    for name, is_decayed in found.items():
        assert is_decayed == (name.rsplit("/")[-1] in ("kernel", "table")), name
    tower = clip.TowerConfig(8, 1, 2, 8)
    found = decayed(
        lambda: clip.CLIP(clip.CLIPConfig(8, 4, tower, tower, 8, 4, 7, 8), rngs=nnx.Rngs(0))
    )
    assert not found["logit_scale"] and not found["vision/post_norm/scale"]
    assert found["image_projection"] and found["vision/patches/kernel"]


def test_gradients_are_clipped_by_their_global_norm():
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(clip_norm=1.0, warmup_steps=0), 2)
    params = {"kernel": np.zeros((2, 2), np.float32)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update({"kernel": np.full((2, 2), 50, np.float32)}, tx.init(params), params)
    first_moment = optax.tree_utils.tree_get(state, "mu")["kernel"]
    np.testing.assert_allclose(first_moment, 0.1 * np.full((2, 2), 0.5), rtol=1e-5)


@pytest.mark.parametrize("guard", [None, update_guard.GuardConfig()], ids=["", "guarded"])
@pytest.mark.parametrize(
    ("start", "gradient", "expected"),
    [
        (99.0, -1.0, [100, 100, 100]),  # A negative gradient raises the parameter.
        (100.0, -1.0, [100, 100, 100]),
        (100.0, 1.0, [90.48, 81.87, 74.08]),
        (150.0, -1.0, [100, 100, 100]),
        (150.0, 1.0, [100, 90.48, 81.87]),
        (20.0, -1.0, [22.10, 24.43, 27.00]),
    ],
)
def test_the_temperature_stops_at_its_bound_and_leaves_it_again(start, gradient, expected, guard):
    """Adam's first steps on a constant gradient have the learning rate's size, here of the logarithm."""
    config = optimizer.OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant")
    tx = optax.with_extra_args_support(optimizer.make_optimizer(config, 9, guard))
    params = {"logit_scale": np.log(np.float32(start)), "kernel": np.float32(np.log(start))}
    grads = jax.tree.map(lambda leaf: np.float32(gradient), params)
    state, found = tx.init(params), []
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params, value=np.float32(1))
        params = optax.apply_updates(params, updates)
        found.append(float(np.exp(params["logit_scale"])))
    assert found == pytest.approx(expected, rel=1e-3)
    # Only the temperature is bounded.
    assert params["kernel"] == pytest.approx(np.log(start) - 0.3 * gradient, rel=1e-3)


GROUPS = (
    {"name": "slow", "params": ("a/*",), "learning_rate": 0.01, "weight_decay": 0.0},
    {"name": "wsd", "params": ("b/kernel",), "schedule": "wsd", "warmup_steps": 2},
)


def run_steps(config, params, grads, num_steps, guard=None):
    """Parameters after each step on one gradient, and the last state."""
    tx = optax.with_extra_args_support(optimizer.make_optimizer(config, 8, guard))
    state, found = tx.init(params), [params]
    for _ in range(num_steps):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, found[-1], value=np.float32(1))
        found.append(optax.apply_updates(found[-1], updates))
    return found, state


def tree(value):
    leaf = lambda: np.full((2, 2), value, np.float32)
    return {"a": {"kernel": leaf()}, "b": {"kernel": leaf()}, "c": {"kernel": leaf()}}


def test_each_group_has_its_own_rate_schedule_and_decay_and_all_share_one_clip():
    common = dict(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=0.1)
    config = optimizer.OptimizerConfig(**common, groups=GROUPS)
    grads = jax.tree.map(lambda leaf: leaf * 7, tree(1.0))
    found, state = run_steps(config, tree(1.0), grads, 5)
    rest = {"a": {}, "b": dict(schedule="wsd", warmup_steps=2), "c": {}}
    rest["a"] = dict(learning_rate=0.01, weight_decay=0.0)
    for key, change in rest.items():
        # Alone, with a clip that leaves the share of the common norm.
        own = optimizer.OptimizerConfig(**common | change | dict(clip_norm=0.1 / 3**0.5))
        alone, _ = run_steps(own, {key: tree(1.0)[key]}, {key: grads[key]}, 5)
        for step in range(6):
            np.testing.assert_allclose(
                found[step][key]["kernel"], alone[step][key]["kernel"], rtol=1e-5, err_msg=key
            )
    assert optimizer.averages(state) == {}


@pytest.mark.parametrize("guard", [None, update_guard.GuardConfig()], ids=["", "guarded"])
def test_moving_averages_follow_the_groups_that_have_one(guard):
    groups = ({"name": "follow", "params": ("a/*", "b/*"), "ema": 0.75},)
    config = optimizer.OptimizerConfig(learning_rate=0.1, warmup_steps=0, groups=groups)
    found, state = run_steps(config, tree(1.0), tree(1.0), 4, guard)
    average = jax.device_get(optimizer.averages(state))
    assert average.keys() == {"a", "b"}
    expected = 1.0
    for params in found[1:]:
        expected = 0.75 * expected + 0.25 * params["a"]["kernel"]
    np.testing.assert_allclose(average["a"]["kernel"], expected, rtol=1e-5)
    assert np.abs(average["a"]["kernel"] - found[-1]["a"]["kernel"]).min() > 0.05


def test_a_group_may_have_another_average_than_the_others():
    groups = ({"name": "now", "params": ("a/*",), "ema": 0.0},)
    config = optimizer.OptimizerConfig(learning_rate=0.1, warmup_steps=0, ema=0.5, groups=groups)
    found, state = run_steps(config, tree(1.0), tree(1.0), 2)
    average = optimizer.averages(state)
    np.testing.assert_allclose(average["a"]["kernel"], found[-1]["a"]["kernel"], rtol=1e-6)
    halves = (
        0.25 * found[0]["c"]["kernel"]
        + 0.25 * found[1]["c"]["kernel"]
        + 0.5 * found[2]["c"]["kernel"]
    )
    np.testing.assert_allclose(average["c"]["kernel"], halves, rtol=1e-5)


def test_without_groups_and_averages_the_state_is_what_older_checkpoints_hold():
    state = optimizer.make_optimizer(optimizer.OptimizerConfig(), 9).init(tree(1.0))
    # Count, three first and three second moments, and the schedule's count.
    assert [np.shape(leaf) for leaf in jax.tree.leaves(state)] == [(), *[(2, 2)] * 6, ()]


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (({"name": "x", "params": ("d/*",)},), "the group x has the pattern 'd/\\*'"),
        (
            ({"name": "x", "params": ("a/*",)}, {"name": "y", "params": ("*",)}),
            "a/kernel is in the groups x and y",
        ),
    ],
)
def test_groups_of_no_parameter_or_of_a_common_one_are_refused(groups, says):
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(groups=groups), 9)
    with pytest.raises(UserError, match=says):
        tx.init(tree(1.0))


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (({"name": "x", "params": ("a",)}, {"name": "x", "params": ("b",)}), "one name"),
        (({"name": "x", "params": ("a",), "rate": 1.0},), "no setting 'rate'"),
        (({"name": "x", "params": ("a",), "schedule": "square"},), "'square'"),
        (({"name": "x", "params": ("a",), "ema": 1.0},), "ema is 1.0"),
    ],
)
def test_wrong_settings_of_a_group_are_refused(groups, says):
    with pytest.raises((ValueError, UserError), match=says):
        optimizer.OptimizerConfig(groups=groups)
