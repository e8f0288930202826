"""A training step is a pure function: equal on every mesh, with donated state, and Adam as published."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.models import ra_cm3
from rag_mm.nn import decoder, param_trees
from rag_mm.train import optimizer as optimizer_lib
from rag_mm.train import train_state, train_step

# Compiling for a mesh takes seconds; the last one holds every kind of exchange.
EIGHT = [
    pytest.param("8", marks=pytest.mark.slow),
    pytest.param("4x2x1", marks=pytest.mark.slow),
    "2x2x2",
]
MESHES = {"1": (1, 1, 1), "8": (8, 1, 1), "4x2x1": (4, 2, 1), "2x2x2": (2, 2, 2)}
CONFIG = ra_cm3.RACM3Config(
    decoder.DecoderConfig(
        vocab_size=24,
        num_layers=2,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=32,
        max_seq_len=10,
        qk_norm=True,
        smear_lags=((1, 2), (8, 9)),
        init=decoder.InitConfig(std=0.2),
    ),
    code_offset=16,
)
OPTIMIZER = optimizer_lib.make_optimizer(
    optimizer_lib.OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.1), num_steps=9
)


def make_model():
    return ra_cm3.Model(CONFIG.decoder, rngs=nnx.Rngs(params=0))


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(24, size=(8, 11)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(10, dtype=np.int32), (8, 1)),
        "segment_ids": (np.arange(10) < rng.integers(6, 11, (8, 1))).astype(np.int32),
        "roles": rng.integers(3, size=(8, 10)).astype(np.int8),
    }


@pytest.fixture(scope="module")
def fresh():
    """`init_params` on the last mesh, as NumPy arrays; the other meshes give the same (test_params)."""
    return jax.device_get(param_trees.init_params(make_model, sharding.make_mesh(2, 2, 2)))


@pytest.fixture(scope="module")
def trained(fresh):
    """Name -> the results of three steps on that mesh."""

    @functools.cache
    def train(name):
        mesh = sharding.make_mesh(*MESHES[name])
        graphdef, abstract = param_trees.describe(make_model, mesh)
        params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh, abstract)
        loss_fn = functools.partial(ra_cm3.loss_fn, config=CONFIG)
        step = train_step.make_train_step(graphdef, loss_fn, OPTIMIZER, seed=0)
        states = [train_state.init_state(params, OPTIMIZER, mesh)]
        given, metrics = [states[0]], []
        first = None
        with jax.set_mesh(mesh):
            for i in range(3):
                state, sums = step(given[-1], sharding.put_batch(make_batch(i), mesh))
                metrics.append({k: float(total / weight) for k, (total, weight) in sums.items()})
                given.append(state)
                # A copy: what NumPy looks at cannot be donated.
                first = first or jax.tree.map(jnp.copy, (state.params, _moments(state)))
        return dict(
            first=jax.device_get(first), given=given, metrics=metrics, step=step, abstract=abstract
        )

    return train


def _moments(state):
    """Adam's first and second moments, trees with the structure of the parameters."""
    adam = optax.tree_utils.tree_get(state.opt_state, "ScaleByAdamState")
    return adam.mu, adam.nu


@pytest.mark.parametrize("mesh", EIGHT)
def test_eight_devices_take_the_same_step_as_one(trained, mesh):
    one, eight = trained("1"), trained(mesh)
    for left, right in zip(one["metrics"], eight["metrics"], strict=True):
        assert left == pytest.approx(right, abs=2e-5)
    # The first moment after one step is a tenth of the clipped gradient.
    for left, right in zip(
        jax.tree.leaves(one["first"]), jax.tree.leaves(eight["first"]), strict=True
    ):
        np.testing.assert_allclose(left, right, atol=1e-5)
    last = [jax.device_get(run["given"][-1].params) for run in (one, eight)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), *last)


@pytest.mark.parametrize("mesh", ["1", *EIGHT])
def test_moments_are_sharded_like_their_parameter(trained, mesh):
    """In the state returned by a step as well as in that of `init_state`."""
    run = trained(mesh)
    for state in (run["given"][0], run["given"][-1]):
        wanted = jax.tree.map(lambda leaf: leaf.sharding.spec, run["abstract"])
        for tree in (state.params, *_moments(state)):
            assert jax.tree.map(lambda leaf: leaf.sharding.spec, tree) == wanted
        assert state.step.sharding.is_fully_replicated


@pytest.mark.parametrize("mesh", ["1", *EIGHT])
def test_the_state_is_donated_and_the_step_compiled_once(trained, mesh):
    run = trained(mesh)
    for state in run["given"][:-1]:
        kept = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if not leaf.is_deleted()
        ]
        assert not kept
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run["given"][-1]))
    assert int(run["given"][-1].step) == 3
    assert run["step"]._cache_size() == 1


def test_scopes_name_the_parts_of_a_step_in_a_profile():
    """They are part of the operations' names in the lowered program."""
    mesh = sharding.make_mesh()
    graphdef, abstract = param_trees.describe(make_model, mesh)
    loss_fn = functools.partial(ra_cm3.loss_fn, config=CONFIG)
    step = train_step.make_train_step(graphdef, loss_fn, OPTIMIZER, seed=0)
    with jax.set_mesh(mesh):
        opt_state = jax.eval_shape(OPTIMIZER.init, abstract)
        state = train_state.TrainState(jax.ShapeDtypeStruct((), jnp.int32), abstract, opt_state)
        program = step.lower(state, make_batch())
    names = set(re.findall(r'loc\("([^"]*)"', program.as_text(debug_info=True)))
    for scope in ("gradient", "update", "embed", "block", "qkv", "attention", "mlp", "logits"):
        assert any(re.search(rf"\b{scope}[/)]", name) for name in names), scope


class Linear(nnx.Module):
    """The gradient of its loss is the batch itself."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.array([[1.0, -2.0], [0.5, 3.0]]))
        self.scale = nnx.Param(jnp.array([2.0, -1.0]))


def linear_loss(model, batch, rng):
    loss = (model.kernel[...] * batch["kernel"]).sum() + (model.scale[...] * batch["scale"]).sum()
    return loss, {"loss": (loss, jnp.float32(1)), "draw": (jax.random.uniform(rng), jnp.float32(1))}


def make_linear(seed=0):
    config = optimizer_lib.OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, b1=0.8, b2=0.95, weight_decay=0.2, clip_norm=2.0
    )
    optimizer = optimizer_lib.make_optimizer(config, num_steps=6)
    graphdef, params = nnx.split(Linear(), nnx.Param)
    state = train_state.init_state(nnx.to_pure_dict(params), optimizer, sharding.make_mesh())
    return state, train_step.make_train_step(graphdef, linear_loss, optimizer, seed)


def test_steps_equal_a_numpy_adam_with_clipping_decay_and_warm_up():
    state, step = make_linear()
    expected = {name: np.asarray(leaf, float) for name, leaf in state.params.items()}
    first = {name: np.zeros_like(leaf) for name, leaf in expected.items()}
    second = {name: np.zeros_like(leaf) for name, leaf in expected.items()}
    rates = [0.0, 0.05, 0.1, 0.075]  # two steps up from zero, then down to zero at the sixth
    for t, rate in enumerate(rates, start=1):
        rng = np.random.default_rng(t)
        # The first gradient is small enough to pass the clip, the others are not.
        size = 0.1 if t == 1 else 10.0
        grads = {name: size * rng.normal(size=leaf.shape) for name, leaf in expected.items()}
        batch = {name: grad.astype(np.float32) for name, grad in grads.items()}
        state, metrics = step(state, batch)
        norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
        np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-5)
        for name, grad in grads.items():
            grad = grad * min(1.0, 2.0 / norm)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            update = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.95**t)) + 1e-8)
            decay = 0.2 * expected[name] if name == "kernel" else 0.0  # decoupled, matrices only
            expected[name] = expected[name] - rate * (update + decay)
        for name, leaf in expected.items():
            np.testing.assert_allclose(state.params[name], leaf, rtol=1e-5, atol=1e-6)
    assert int(state.step) == len(rates)


def test_randomness_depends_only_on_seed_and_step():
    batch = {"kernel": np.ones((2, 2), np.float32), "scale": np.ones(2, np.float32)}
    draws = []
    for seed in (0, 0, 1):
        state, step = make_linear(seed)
        for _ in range(2):
            state, metrics = step(state, batch)
            draws.append(float(metrics["draw"][0]))
    assert draws[:2] == draws[2:4]
    assert len(set(draws)) == 4
