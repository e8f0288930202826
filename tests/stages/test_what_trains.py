"""What a stage trains: frozen parameters keep every bit, averages become the result, two losses one model."""

import ctypes
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.models import ra_cm3
from rag_mm.nn import decoder, lora, param_trees
from rag_mm.stages import training
from rag_mm.train import loop, optimizer, train_state, train_step

SIZES = dict(vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=16, max_seq_len=6)
CONFIG = ra_cm3.RACM3Config(
    decoder.DecoderConfig(**SIZES, mlp="relu", tie_embeddings=True), code_offset=8
)
LORA = lora.LoRAConfig(rank=2, targets=("q", "out", "down"))
ADAM = optimizer.OptimizerConfig(learning_rate=0.05, warmup_steps=0, schedule="constant")


def make_model():
    return ra_cm3.Model(CONFIG.decoder, rngs=nnx.Rngs(params=0))


def make_lora_model():
    return lora.add(make_model(), LORA, rngs=nnx.Rngs(params=1))


def make_batches():
    def example(index, rng):
        tokens = np.random.default_rng(int(index)).integers(16, size=7).astype(np.int32)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "positions": np.arange(6, dtype=np.int32),
            "segment_ids": np.ones(6, np.int32),
            "roles": np.ones(6, np.int8),
        }

    return pipeline.make_batches(np.arange(8), 4, 0, example)


def loss_fn(model, batch, rng):
    return ra_cm3.loss_fn(model, batch, rng, config=CONFIG)


def train(
    folder,
    make_model,
    mesh=(1, 1, 1),
    num_steps=6,
    config=ADAM,
    loss=loss_fn,
    data=make_batches,
    **options,
):
    return training.train(
        "toy",
        folder,
        make_model,
        loss,
        data(),
        optimizer_config=config,
        loop_config=loop.LoopConfig(num_steps, log_every=2, checkpoint_every=6),
        seed=0,
        mesh=sharding.make_mesh(*mesh),
        **options,
    )


def random_base(abstract):
    """The same values on every mesh."""
    rng = np.random.default_rng(0)
    base = param_trees.split(abstract, lora.is_added)[1]
    return jax.tree.map(
        lambda leaf: jax.device_put(
            rng.normal(0, 0.3, leaf.shape).astype(np.float32), leaf.sharding
        ),
        base,
    )


@pytest.fixture(scope="module")
def base():
    return jax.device_get(random_base(param_trees.describe(make_model, None)[1]))


ONLY_LORA = training.WhatTrains(lambda path: not lora.is_added(path))


@pytest.fixture(scope="module")
def with_lora(tmp_path_factory):
    """Mesh -> the parameters and the log of a few LoRA steps, and the folder."""
    made = {}

    def run(mesh):
        if mesh not in made:
            folder = tmp_path_factory.mktemp("lora")
            made[mesh] = (
                *train(folder, make_lora_model, mesh, start=random_base, what=ONLY_LORA),
                folder,
            )
        return made[mesh]

    return run


MESHES = [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_lora_steps_leave_every_bit_of_the_base_and_learn(with_lora, base, mesh):
    params, rows, _ = with_lora(mesh)
    added, rest = param_trees.split(jax.device_get(params), lora.is_added)
    jax.tree.map(np.testing.assert_array_equal, rest, base)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(added))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05


@pytest.mark.slow
def test_lora_steps_do_not_depend_on_the_mesh(with_lora):
    (one, rows, _), (eight, rows_of_eight, _) = with_lora((1, 1, 1)), with_lora((2, 2, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one, eight)
    losses = [[row["loss"] for row in each] for each in (rows, rows_of_eight)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    _, plain = param_trees.describe(make_model, sharding.make_mesh(2, 2, 2))
    specs_of = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
    assert specs_of(lora.merge(eight, LORA)) == specs_of(plain)


@pytest.mark.slow
def test_a_base_in_bfloat16_trains_on_a_mesh(tmp_path):
    narrow = dataclasses.replace(CONFIG.decoder, dtype="bfloat16")
    make = lambda: lora.add(
        ra_cm3.Model(narrow, rngs=nnx.Rngs(params=0)), LORA, rngs=nnx.Rngs(params=1)
    )
    what = dataclasses.replace(ONLY_LORA, frozen_dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):
        params, rows = train(tmp_path, make, (2, 2, 2), start=random_base, what=what)
    added, rest = param_trees.split(params, lora.is_added)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rest)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(added)} == {"float32"}
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05


def test_checkpoints_hold_no_frozen_parameter(with_lora):
    _, _, folder = with_lora((1, 1, 1))
    metadata = json.loads((folder / "checkpoints/6/params/_METADATA").read_text())
    names = [leaf["key_metadata"][-1]["key"] for leaf in metadata["tree_metadata"].values()]
    assert sorted(names) == [lora.A] * 3 + [lora.B] * 3


class Toy(nnx.Module):
    """Numbers that follow the data, numbers that follow the first, and numbers that stay."""

    def __init__(self):
        self.first, self.second, self.still = (
            nnx.Param(jnp.full(4, 0.1, jnp.float32)) for _ in range(3)
        )


def first_loss(model, batch, rng):
    error = jnp.square(model.first[...] + model.still[...] - batch["x"].mean()).mean()
    return error, {"loss": (error, jnp.float32(1))}


def second_loss(model, batch, rng):
    error = jnp.square(model.second[...] - model.first[...]).mean()
    return error, {"loss": (error, jnp.float32(1))}


def ones():
    return pipeline.make_batches(np.arange(8), 4, 0, lambda index, rng: {"x": np.float32(1)})


TOY = dict(make_model=Toy, loss=first_loss, data=ones)
IS_FROZEN = lambda path: path == "still"


def test_frozen_parameters_may_be_kept_narrow(tmp_path):
    what = training.WhatTrains(IS_FROZEN, "bfloat16")
    with jax.numpy_dtype_promotion("standard"):
        params, _ = train(tmp_path, **TOY, what=what, num_steps=2)
    assert params["still"].dtype == jnp.bfloat16 and params["first"].dtype == jnp.float32
    np.testing.assert_array_equal(params["still"], jnp.full(4, 0.1, jnp.bfloat16))
    assert (params["first"] != 0.1).all()


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(UserError, match="every parameter is frozen"):
        train(tmp_path, **TOY, what=training.WhatTrains(lambda path: True))


def test_a_frozen_parameter_that_changes_is_named(tmp_path, monkeypatch):
    real = loop.fit

    def spoil(name, state, step_fn, *rest):
        """Writes into a buffer of the host, as a wrong donation would."""
        held = step_fn.keywords["held"]["still"]
        result = real(name, state, step_fn, *rest)
        ctypes.memset(held.unsafe_buffer_pointer(), 1, 4)
        return result

    monkeypatch.setattr(loop, "fit", spoil)
    with pytest.raises(RuntimeError, match="the frozen parameter still changed"):
        train(tmp_path, **TOY, what=training.WhatTrains(IS_FROZEN), num_steps=2)


def test_held_parameters_have_neither_gradient_nor_optimizer_state():
    graphdef, abstract = param_trees.describe(make_model, None)
    held, own = param_trees.split(abstract, lambda path: path.startswith("stack/"))
    tx = optimizer.make_optimizer(ADAM, 4)
    opt_state = jax.eval_shape(tx.init, own)
    state = train_state.TrainState(jax.ShapeDtypeStruct((), jnp.int32), own, opt_state)
    step = train_step.make_train_step(graphdef, loss_fn, tx, 0)
    batch = {key: value for key, value in next(make_batches()).items() if key != pipeline.RECORDS}
    after, _ = jax.eval_shape(functools.partial(step, held=held), state, batch)
    assert jax.tree.structure(after.params) == jax.tree.structure(own)
    shapes = {leaf.shape for leaf in jax.tree.leaves(after.opt_state)}
    assert shapes == {(), *(leaf.shape for leaf in jax.tree.leaves(own))}


def test_the_moving_average_is_the_result_and_what_is_watched(tmp_path):
    watched = {}

    def watch(step, params):
        watched[step] = jax.device_get(params["first"])
        return {}

    settings = dict(config=dataclasses.replace(ADAM, ema=0.5), what=training.WhatTrains(IS_FROZEN))
    averaged, _ = train(tmp_path / "whole", **TOY, **settings, num_steps=6, watch=watch)
    np.testing.assert_array_equal(watched[6], averaged["first"])
    # Adam's steps on a gradient of one sign have the learning rate's size.
    values = 0.1 + 0.05 * np.arange(7)
    expected = values[0]
    for value in values[1:]:
        expected = (expected + value) / 2
    assert float(averaged["first"][0]) == pytest.approx(expected, abs=5e-3)
    # Without a checkpoint at step 4 this one would start again.
    train(tmp_path / "cut", **TOY, **settings, num_steps=4)
    resumed, _ = train(tmp_path / "cut", **TOY, **settings, num_steps=6)
    np.testing.assert_array_equal(resumed["first"], averaged["first"])


def test_a_stage_trains_two_losses_and_resumes(tmp_path):
    further = training.FurtherLoss(second_loss, ADAM, lambda path: path == "second")
    what = training.WhatTrains(IS_FROZEN, further_losses={"follow": further})
    params, rows = train(tmp_path / "whole", **TOY, what=what, num_steps=60)
    np.testing.assert_allclose(params["first"], 0.9, atol=0.05)
    np.testing.assert_allclose(params["second"], 0.9, atol=0.1)
    np.testing.assert_array_equal(params["still"], np.float32(0.1))
    assert {"loss", "grad_norm", "follow/loss", "follow/grad_norm"} <= rows[-1].keys()
    train(tmp_path / "cut", **TOY, what=what, num_steps=30)
    resumed, _ = train(tmp_path / "cut", **TOY, what=what, num_steps=60)
    jax.tree.map(np.testing.assert_array_equal, resumed, params)
