"""A stage whose loop has a guard leaves out poisoned batches, and gives up by naming their records."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.stages import chain_config, training
from rag_mm.train import loop, optimizer, update_guard

BATCH, NUM_RECORDS = 2, 8


class Line(nnx.Module):
    """y = kernel x."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.full((3,), 0.5), axes=(None,))


def loss_fn(model, batch, rng):
    error = (batch["x"] * model.kernel[...][None]).sum(1) - batch["y"]
    return jnp.square(error).mean(), {"loss": (jnp.square(error).sum(), jnp.float32(len(error)))}


def train(directory, poisoned, guarded, num_steps=8):
    """Parameters and log of a stage of which some records are no numbers."""

    def make_example(index, rng):
        x = rng.normal(size=3).astype(np.float32)
        return {"x": x, "y": np.float32(np.nan if index in poisoned else x.sum())}

    return training.train(
        "line",
        directory,
        Line,
        loss_fn,
        pipeline.make_batches(np.arange(NUM_RECORDS), BATCH, 0, make_example),
        optimizer_config=optimizer.OptimizerConfig(learning_rate=0.1, warmup_steps=1),
        loop_config=loop.LoopConfig(num_steps, log_every=4, checkpoint_every=4, guard=guarded),
        seed=0,
        mesh=sharding.make_mesh(),
    )


def test_a_poisoned_batch_is_left_out(tmp_path):
    params, rows = train(tmp_path, {5}, update_guard.GuardConfig(max_in_a_row=2))
    assert np.isfinite(jax.device_get(params["kernel"])).all()
    # Eight steps of two are two epochs of eight records.
    assert rows[-1]["skipped"] == 2 and np.isfinite(rows[-1]["loss"])


def test_a_run_of_them_ends_with_their_records(tmp_path):
    with pytest.raises(FloatingPointError, match="4 updates in a row") as caught:
        train(
            tmp_path,
            set(range(NUM_RECORDS)),
            update_guard.GuardConfig(max_in_a_row=3),
            num_steps=12,
        )
    # Noticed when the log is written, a step later than it could be.
    named = json.loads((tmp_path / loop.SKIPPED).read_text())
    assert all(str(record) in str(caught.value) for ids in named.values() for record in ids)
    assert len(named) >= 3 and {len(ids) for ids in named.values()} == {BATCH}


def test_without_a_guard_a_poisoned_batch_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="is not finite"):
        train(tmp_path, {5}, None)


def test_a_guard_that_skips_nothing_changes_rounding_at_most(tmp_path):
    plain, _ = train(tmp_path / "plain", set(), None)
    guarded, _ = train(tmp_path / "guarded", set(), update_guard.GuardConfig())
    # Its update is a branch, which XLA compiles by itself.
    kernels = [jax.device_get(params["kernel"]) for params in (plain, guarded)]
    np.testing.assert_array_max_ulp(*kernels, maxulp=4)


def load(**overrides):
    page = chain_config.load("configs/quickstart.py:tiny", overrides)
    return chain_config.stage_configs(page)


def test_a_guard_is_named_on_the_page_or_by_an_override():
    assert {load()[name].loop.guard for name in ("tokenizer", "retriever", "decoder")} == {None}
    made = load(**{"decoder.loop.guard": "{'window': 64}"})
    assert (
        made["decoder"].loop.guard
        == made["control"].loop.guard
        == update_guard.GuardConfig(window=64)
    )
    assert made["retriever"].loop.guard is None  # Though the page gives both one loop.
    assert (
        load(**{"tokenizer.loop.guard": "{}"})["tokenizer"].loop.guard == update_guard.GuardConfig()
    )


def test_a_manifest_records_a_guard_only_where_there_is_one():
    """Stages that were finished before loops could have a guard stay finished."""
    assert "guard" not in chain_config.slice_of(load()["decoder"])["loop"]
    made = load(**{"decoder.loop.guard": "{}"})["decoder"]
    assert chain_config.slice_of(made)["loop"]["guard"]["window"] == update_guard.GuardConfig.window


def test_a_manifest_records_a_field_that_was_added_later_only_where_it_is_used():
    """Runs that were finished before schedules could end above zero stay finished."""
    assert "end_rate" not in chain_config.slice_of(load()["decoder"])["optimizer"]
    made = load(**{"decoder.optimizer.end_rate": "0.1"})["decoder"]
    assert chain_config.slice_of(made)["optimizer"]["end_rate"] == 0.1


def test_a_manifest_records_what_differs_from_a_models_defaults():
    """A field that is added to a model's config later does not make finished runs look edited."""
    model = chain_config.slice_of(load()["decoder"])["model"]
    assert model["embed_dim"] == 64 and "rope_theta" not in model and "init" not in model
    changed = load(**{"decoder.model.init.std": "0.01"})["decoder"]
    assert chain_config.slice_of(changed)["model"]["init"]["std"] == 0.01


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("on", "guard is 'on'; give None or its settings"),
        ("{'windw': 64}", "decoder.loop.guard has no setting 'windw'"),
        ("{'window': 1}", "a guard's window is at least 2"),
    ],
)
def test_a_guard_that_is_none(text, says):
    with pytest.raises(UserError, match=says):
        load(**{"decoder.loop.guard": text})
