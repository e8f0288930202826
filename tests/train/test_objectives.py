"""Several losses in one step: each trains its own parameters, and a toy generator learns the data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.train import objectives, optimizer, train_state, train_step, update_guard

MEAN, STD = 3.0, 0.5


class Gan(nnx.Module):
    """A generator, mean + exp(log_std) * noise, and a discriminator, a two-layer net on numbers."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 2)
        self.generator = nnx.Dict(mean=nnx.Param(jnp.float32(0)), log_std=nnx.Param(jnp.float32(0)))
        self.discriminator = nnx.Dict(
            first=nnx.Param(jax.random.normal(keys[0], (2, 16))),
            second=nnx.Param(0.3 * jax.random.normal(keys[1], (16, 1))),
        )

    def draw(self, rng, count):
        noise = jax.random.normal(rng, (count,))
        return self.generator["mean"][...] + jnp.exp(self.generator["log_std"][...]) * noise

    def judge(self, x):
        x = jnp.stack([x, jnp.ones_like(x)], 1)
        return (jnp.tanh(x @ self.discriminator["first"][...]) @ self.discriminator["second"][...])[
            :, 0
        ]


def metrics(losses, **more):
    count = jnp.float32(len(losses))
    sums = {"loss": (losses.sum(), count)}
    return losses.mean(), sums | {k: (v.sum(), count) for k, v in more.items()}


def generator_loss(model, batch, rng):
    fake = model.draw(rng, len(batch["x"]))
    return metrics(jax.nn.softplus(-model.judge(fake)), mean=fake)


def discriminator_loss(model, batch, rng):
    fake = model.draw(rng, len(batch["x"]))
    return metrics(jax.nn.softplus(-model.judge(batch["x"])) + jax.nn.softplus(model.judge(fake)))


LOSSES = {"generator": generator_loss, "discriminator": discriminator_loss}
GRAPHDEF, PARAMS = nnx.split(Gan(), nnx.Param)


def make(make_optimizer, order=("generator", "discriminator"), **options):
    """The state at step 0, whose buffers may be donated, and the step."""
    by_name = {
        name: objectives.Objective(
            LOSSES[name], make_optimizer(name), lambda path, name=name: path.startswith(f"{name}/")
        )
        for name in order
    }
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(PARAMS))
    state = objectives.init_state(params, by_name, sharding.make_mesh())
    return state, objectives.make_train_step(GRAPHDEF, by_name, 0, **options)


def draw_batch(step, count=64):
    rng = np.random.default_rng(step)
    return {"x": rng.normal(MEAN, STD, count).astype(np.float32)}


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_generator_learns_the_distribution_of_the_data(in_turn):
    state, step = make(lambda name: optax.adam(2e-2, b1=0.5), in_turn=in_turn)
    means = []
    for number in range(1200):
        state, sums = step(state, draw_batch(number, 256))
        means.append(sums["mean"][0] / sums["mean"][1])
    assert abs(float(means[0])) < 0.3
    # A small GAN circles around its goal.
    assert np.mean(means[-400:]) == pytest.approx(MEAN, abs=0.4)
    assert int(state.step) == 1200
    std = float(jnp.exp(state.params["generator"]["log_std"]))
    assert std == pytest.approx(STD, abs=0.35)


def gradients(params):
    """Of each loss, with respect to its own parameters, at step 0."""
    rng = jax.random.fold_in(jax.random.key(0), 0)

    def grad(name):
        loss = lambda own: LOSSES[name](
            nnx.merge(GRAPHDEF, params | {name: own}), draw_batch(0), rng
        )[0]
        return jax.grad(loss)(params[name])

    return {name: grad(name) for name in LOSSES}


@pytest.mark.parametrize("in_turn", [False, True])
def test_each_loss_updates_its_own_parameters_at_the_right_place(in_turn):
    """Simultaneously at the old parameters; in turn the second sees what the first has changed."""
    rates = {"generator": 0.5, "discriminator": 0.25}
    state, step = make(lambda name: optax.sgd(rates[name]), in_turn=in_turn)
    state, sums = step(state, draw_batch(0))
    old = nnx.to_pure_dict(PARAMS)
    expected = dict(old)
    for name, rate in rates.items():
        grads = gradients(expected if in_turn else old)[name]
        expected[name] = jax.tree.map(lambda p, g, rate=rate: p - rate * g, old[name], grads)
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6),
        state.params,
        expected,
    )
    assert sums.keys() == {
        *("loss", "mean", "grad_norm"),
        *("discriminator/loss", "discriminator/grad_norm"),
    }


def test_one_objective_over_all_parameters_is_the_plain_step():
    def loss_fn(model, batch, rng):
        return discriminator_loss(model, batch, rng)

    config = optimizer.OptimizerConfig(learning_rate=0.1, warmup_steps=1)
    tx = optimizer.make_optimizer(config, 9)
    both = {"all": objectives.Objective(loss_fn, tx, lambda path: True)}
    mesh, params = sharding.make_mesh(), lambda: jax.tree.map(jnp.copy, nnx.to_pure_dict(PARAMS))
    plain = train_state.init_state(params(), tx, mesh)
    several = objectives.init_state(params(), both, mesh)
    plain_step = train_step.make_train_step(GRAPHDEF, loss_fn, tx, 0)
    several_step = objectives.make_train_step(GRAPHDEF, both, 0)
    for number in range(3):
        plain, _ = plain_step(plain, draw_batch(number))
        several, _ = several_step(several, draw_batch(number))
    jax.tree.map(np.testing.assert_array_equal, plain.params, several.params)


def test_a_guard_skips_one_objectives_bad_update_and_counts_it():
    config = optimizer.OptimizerConfig(warmup_steps=0, schedule="constant")
    guard = update_guard.GuardConfig()
    state, step = make(lambda name: optimizer.make_optimizer(config, 9, guard))
    before = jax.device_get(state.params)
    state, _ = step(state, {"x": np.full(64, np.nan, np.float32)})
    assert update_guard.counts(state.opt_state) == (1, 1)
    # The generator's loss reads no data.
    after = jax.device_get(state.params)
    jax.tree.map(np.testing.assert_array_equal, before["discriminator"], after["discriminator"])
    assert before["generator"]["mean"] != after["generator"]["mean"]


@pytest.mark.parametrize(
    ("trains", "says"),
    [(lambda path: False, "no objective"), (lambda path: True, "generator and discriminator")],
)
def test_a_parameter_of_no_objective_or_of_two_is_refused(trains, says):
    by_name = {
        "generator": objectives.Objective(
            generator_loss, optax.sgd(1.0), lambda path: path[0] == "g"
        ),
        "discriminator": objectives.Objective(discriminator_loss, optax.sgd(1.0), trains),
    }
    with pytest.raises(ValueError, match=says):
        objectives.init_state(nnx.to_pure_dict(PARAMS), by_name, sharding.make_mesh())
