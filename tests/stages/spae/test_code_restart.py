"""Dead codes in training come back by a restart and not without; a resumed run is the same; words stay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.models.spae import autoencoder, code_restart, objective
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.stages import training
from rag_mm.stages.shared import dead_codes, tokenizer_figures
from rag_mm.train import loop, optimizer

MODEL = SPAEConfig(
    image_size=16,
    patch_size=4,
    encoder="patch",
    width=8,
    width_multipliers=(1,),
    num_res_blocks=0,
    embed_dim=8,
    codebook_size=32,
    levels=(2, 4),
)
ADAM = optimizer.OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant")
RESTART = code_restart.RestartConfig(every=4, min_use=0.1, decay=0.5, until=1)
IMAGES = np.random.default_rng(0).integers(256, size=(16, 16, 16, 3)).astype(np.uint8)
NUM_STEPS = 12


def make_model():
    return autoencoder.SPAE(MODEL, rngs=nnx.Rngs(params=0))


def mostly_dead(params):
    """All codes but the first two are far from every vector."""
    book = np.asarray(params["codebook"]).copy()
    book[2:] = 100
    return params | {"codebook": jax.device_put(book, params["codebook"].sharding)}


def train(folder, restart=RESTART, num_steps=NUM_STEPS, mesh=(1, 1, 1)):
    rule = dead_codes.make_rule(restart, MODEL.codebook_size, NUM_STEPS)
    return training.train(
        "toy",
        folder,
        make_model,
        objective.loss_fn,
        pipeline.make_batches(IMAGES, 8, 0, lambda image, rng: {"images": image}),
        optimizer_config=ADAM,
        loop_config=loop.LoopConfig(num_steps, log_every=2, checkpoint_every=2),
        seed=0,
        mesh=sharding.make_mesh(*mesh),
        prepare=mostly_dead,
        what=training.WhatTrains(step_end=rule),
        derive=tokenizer_figures.derive,
    )


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("restarted"))


def test_dead_codes_come_back_with_the_restart_and_not_without(tmp_path, restarted):
    without_params, without = train(tmp_path, code_restart.RestartConfig())
    params, log = restarted
    assert log[0]["code_usage"] == without[0]["code_usage"] <= 2 / 32
    assert without[-1]["code_usage"] <= 2 / 32 and (without_params["codebook"][2:] == 100).all()
    assert log[-1]["code_usage"] > 0.5 and log[-1]["perplexity"] > 2 * without[-1]["perplexity"]
    # The first restart finds 30 dead codes; a line between restarts has none to tell of.
    assert [row["restarted_codes"] for row in log[:2]] == [0, 30]
    assert np.abs(params["codebook"]).max() < 100 and log[-1]["psnr"] > without[-1]["psnr"]


def test_a_run_resumed_between_restarts_is_bitwise_the_same(tmp_path, restarted):
    train(
        tmp_path, num_steps=6
    )  # Two steps after a restart: what was used since then decides the next.
    resumed, log = train(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed, restarted[0])
    assert log == restarted[1]


def test_devices_move_the_same_codes(tmp_path, restarted):
    params, log = train(tmp_path, mesh=(2, 2, 1))
    assert [row["restarted_codes"] for row in log] == [
        row["restarted_codes"] for row in restarted[1]
    ]
    # A gradient that is rounding alone moves Adam's parameters by the learning rate, either way.
    far = 2 * NUM_STEPS * ADAM.learning_rate
    np.testing.assert_allclose(params["codebook"], restarted[0]["codebook"], atol=far)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_whose_update_is_skipped_moves_nothing(skipped):
    counts = jnp.zeros((2, 32)).at[:, 0].set(80.0)
    found, use, metrics = _update(counts * float(not skipped), jnp.float32(0 if skipped else 160))
    is_same = np.asarray(found["codebook"] == make_model().codebook[...]).all(axis=1)
    assert is_same.tolist() == [True] + [skipped] * 31
    assert metrics["restarted_codes"][0] == (0 if skipped else 31)
    if skipped:
        np.testing.assert_array_equal(use, jnp.zeros(32))
    else:
        np.testing.assert_allclose(use, [0.5] + [1 / 32] * 31)


@functools.cache
def _compiled_update():
    graphdef, params = nnx.split(make_model(), nnx.Param)
    rule = functools.partial(code_restart.update, config=RESTART, num_steps=NUM_STEPS)

    @jax.jit
    def run(counts, total):
        model, metrics = nnx.merge(graphdef, params), {"code_frequencies": (counts, total)}
        fixed = dict(step=jnp.int32(4), rng=jax.random.key(0))
        return rule(model, {"images": jnp.asarray(IMAGES)}, metrics, jnp.zeros(32), **fixed)

    return run


def _update(counts, total):
    return _compiled_update()(counts, total)


def test_after_its_last_step_no_code_is_moved(tmp_path):
    params, log = train(tmp_path, dataclasses.replace(RESTART, until=0.3), num_steps=4)
    assert log[-1]["restarted_codes"] == 0 and (params["codebook"][2:] == 100).all()


def test_words_of_a_language_codebook_are_never_moved():
    with pytest.raises((UserError, ValueError), match="a codebook of words never changes"):
        RESTART.check(dataclasses.replace(MODEL, codebook="language"))
    RESTART.check(MODEL)
    code_restart.RestartConfig().check(dataclasses.replace(MODEL, codebook="language"))
