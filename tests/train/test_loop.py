"""The training loop: a run that is killed and restarted is bitwise identical to an uninterrupted one."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.nn import param_trees
from rag_mm.train import (
    checkpoint,
    loop,
    optimizer,
    throughput,
    train_metrics,
    train_state,
    train_step,
    update_guard,
)

# Orbax leaves coroutines behind when it refuses to load.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

SCHEDULE = loop.LoopConfig(num_steps=8, log_every=2, checkpoint_every=4)


class Line(nnx.Module):
    """y = kernel x + bias, fitted with noise from the step's rng."""

    def __init__(self, width=3):
        self.kernel = nnx.Param(jnp.full((width,), 0.5), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(()), axes=())


def loss_fn(model, batch, rng):
    noise = 0.1 * jax.random.normal(rng, batch["y"].shape)
    kernel = model.kernel[...][None]
    error = (batch["x"] * kernel).sum(1) + model.bias[...] + noise - batch["y"]
    loss = jnp.square(error).mean()
    return loss, {"loss": (jnp.square(error).sum(), jnp.float32(len(error)))}


def make_example(index, rng):
    """Random in every epoch, so that a lost or repeated batch changes the result."""
    x = rng.normal(size=3).astype(np.float32)
    return {"x": x, "y": np.float32(x @ [1.0, 2.0, 3.0] + index)}


def begin(make_model=Line, loss_fn=loss_fn):
    """Everything that a new process would create; two calls share nothing."""
    mesh = sharding.make_mesh(2, 1, 1)
    graphdef, _ = param_trees.describe(make_model, mesh)
    params = param_trees.init_params(make_model, mesh)
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(learning_rate=1.0, warmup_steps=2), 8)
    return {
        "state": train_state.init_state(params, tx, mesh),
        "step_fn": train_step.make_train_step(graphdef, loss_fn, tx, seed=0),
        "iterator": pipeline.make_batches(np.arange(6), 4, 1, make_example),
        "mesh": mesh,
    }


def fit(directory, config=SCHEDULE, iterator=None, derive=None, **options):
    parts = begin(**options)
    if iterator is not None:
        parts["iterator"] = iterator(parts["iterator"])
    state, rows = loop.fit("line", directory=directory, config=config, derive=derive, **parts)
    return jax.device_get(state), rows, parts["iterator"]


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


class Killed(Exception):
    """Simulates SIGKILL: nothing in the loop catches it."""


class KillingIterator:
    """An iterator that kills the run when batch `at` is requested."""

    def __init__(self, iterator, at):
        self._iterator, self._at = iterator, at

    def __next__(self):
        self._at -= 1
        if not self._at:
            raise Killed
        return next(self._iterator)

    def __getattr__(self, name):
        return getattr(self._iterator, name)


def dying(at):
    """Wraps an iterator so that requesting batch `at` kills the run."""
    return lambda iterator: KillingIterator(iterator, at)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    state, rows, iterator = fit(directory)
    return state, rows, (directory / "log.jsonl").read_bytes(), next(iterator)


def test_a_run_logs_and_learns(unbroken):
    state, rows, _, _ = unbroken
    assert state.step == 8
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0].keys() == {"step", "loss", "grad_norm"}


def test_eight_steps_equal_four_and_four_more(unbroken, tmp_path):
    """The second half is a separate run: new iterator, newly compiled step, fresh parameters."""
    half = loop.LoopConfig(num_steps=4, log_every=2, checkpoint_every=4)
    first, rows, _ = fit(tmp_path, half)
    assert first.step == 4 and len(rows) == 2
    state, rows, iterator = fit(tmp_path)
    assert_same(state, unbroken[0])
    assert rows == unbroken[1]
    assert (tmp_path / "log.jsonl").read_bytes() == unbroken[2]
    assert_same(next(iterator), unbroken[3])


@pytest.mark.parametrize("batch", [2, 4, 5, 8])
def test_a_run_killed_anywhere_ends_with_the_same_bits(unbroken, tmp_path, batch):
    """Before the first checkpoint, or with a log that is ahead of the checkpoint (killed at batch 8)."""
    with pytest.raises(Killed):
        fit(tmp_path, iterator=dying(batch))
    state, rows, iterator = fit(tmp_path)
    assert_same(state, unbroken[0])
    assert rows == unbroken[1]
    assert (tmp_path / "log.jsonl").read_bytes() == unbroken[2]
    assert_same(next(iterator), unbroken[3])


@pytest.mark.parametrize(
    "text", ["", "[]", '{"step": 4, "sums": {"loss": ["x"]}}', '{"step": NaN}']
)
def test_damaged_averages_and_logs_stop_no_resume(unbroken, tmp_path, text):
    with pytest.raises(Killed):
        fit(tmp_path, iterator=dying(6))
    (tmp_path / loop.PARTIAL).write_text(text)
    (tmp_path / "speed.jsonl").write_text("[[[")
    state, rows, _ = fit(tmp_path)
    assert_same(state, unbroken[0])
    assert rows == unbroken[1]


def test_a_finished_run_is_not_run_again(unbroken, tmp_path):
    fit(tmp_path)
    state, rows, _ = fit(tmp_path, iterator=dying(1))
    assert_same(state, unbroken[0])
    assert rows == unbroken[1]


def test_the_last_step_is_logged_and_saved_wherever_it_falls(tmp_path):
    _, rows, _ = fit(tmp_path, loop.LoopConfig(num_steps=3, log_every=2, checkpoint_every=4))
    assert [row["step"] for row in rows] == [2, 3]
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert saved.latest_step == 3
    saved.close()


def test_derived_metrics_are_logged_with_the_averages(tmp_path):
    root = lambda values: {"root_loss": float(np.sqrt(values["loss"]))}
    _, rows, _ = fit(tmp_path, loop.LoopConfig(4, 2, 2), derive=root)
    for row in rows:
        assert row["root_loss"] == pytest.approx(np.sqrt(row["loss"]), abs=1e-5)


def test_a_non_finite_loss_stops_the_run_and_is_not_saved(tmp_path):
    def poisoned(index, rng):
        return make_example(index, rng) | {"y": np.float32(np.nan)}

    fit(tmp_path, loop.LoopConfig(num_steps=4, log_every=2, checkpoint_every=2))
    bad = lambda _: pipeline.make_batches(np.arange(6), 4, 1, poisoned)
    with pytest.raises(FloatingPointError, match="line: the loss at step 6 is not finite"):
        fit(tmp_path, loop.LoopConfig(num_steps=8, log_every=2, checkpoint_every=2), iterator=bad)
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert saved.latest_step == 4
    saved.close()
    assert [row["step"] for row in train_metrics.read_log(tmp_path / "log.jsonl")] == [2, 4]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(tmp_path, loop.LoopConfig(4, 2, 2))
    with pytest.raises(UserError, match="does not fit this model"):
        fit(tmp_path, make_model=lambda: Line(width=4))


@pytest.mark.parametrize("sizes", [(0, 2, 4), (8, 3, 4), (8, 0, 4), (8, 2, 0)])
def test_checkpoints_fall_on_logged_steps(sizes):
    with pytest.raises(ValueError, match="multiple|at least 1"):
        loop.LoopConfig(*sizes)


def poisoned_from(first, last):
    """Batches whose targets are NaN from batch `first` to `last`."""

    def make(iterator):
        class Poisoned:
            count = 0

            def __next__(self):
                self.count += 1
                batch = next(iterator)
                bad = first <= self.count <= last
                return batch | {"y": batch["y"] * np.float32(np.nan if bad else 1)}

            def __getattr__(self, name):
                return getattr(iterator, name)

        return Poisoned()

    return make


def fit_guarded(directory, first, last, max_skipped=3, config=SCHEDULE):
    mesh = sharding.make_mesh(2, 1, 1)
    graphdef, _ = param_trees.describe(Line, mesh)
    tx = optimizer.make_optimizer(
        optimizer.OptimizerConfig(learning_rate=1.0, warmup_steps=2),
        8,
        update_guard.GuardConfig(window=4),
    )
    parts = begin()
    parts["state"] = train_state.init_state(param_trees.init_params(Line, mesh), tx, mesh)
    parts["step_fn"] = train_step.make_train_step(graphdef, loss_fn, tx, seed=0)
    parts["iterator"] = poisoned_from(first, last)(parts["iterator"])
    extras = loop.Extras(max_skipped=max_skipped)
    return loop.fit("line", directory=directory, config=config, extras=extras, **parts)


def test_skipped_updates_are_counted_in_the_log_and_excluded_from_averages(tmp_path):
    state, rows = fit_guarded(tmp_path, 3, 4)
    assert int(state.step) == 8
    assert ["skipped" in row for row in rows] == [False, True, True, True]
    assert rows[-1]["skipped"] == 2 and rows[1]["loss"] == 0  # nothing was averaged
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert np.isfinite(np.asarray(state.params["kernel"])).all()


def test_too_many_skipped_in_a_row_end_the_run_and_name_the_batches(tmp_path):
    with pytest.raises(FloatingPointError, match=r"line: 4 updates in a row .* batches 3 to 6"):
        fit_guarded(tmp_path, 3, 8)
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert saved.latest_step == 4
    saved.close()


def test_speed_is_logged_separately(unbroken, tmp_path):
    """Each of the four rows of a batch has three tokens and two of padding."""

    def with_tokens(index, rng):
        row = {"tokens": np.zeros(5, np.int32), "segment_ids": np.array([1, 1, 1, 0, 0], np.int32)}
        return make_example(index, rng) | row

    cost = throughput.Cost(lambda lengths: 100.0 * lengths, peak=1e6)
    parts = begin() | {"iterator": pipeline.make_batches(np.arange(6), 4, 1, with_tokens)}
    extras = loop.Extras(cost=cost)
    loop.fit("line", directory=tmp_path, config=SCHEDULE, extras=extras, **parts)
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        assert 0 < row["step_seconds_p50"] <= row["step_seconds_p99"]
        assert 0 <= row["input_wait"] <= 1
        seconds = 2 * row["step_seconds_p50"]  # Of two steps the median is the mean.
        assert row["tokens_per_second"] * seconds == pytest.approx(2 * 4 * 3)
        assert row["model_flops_per_second"] * seconds == pytest.approx(2 * 4 * 300)
        assert row["mfu"] == pytest.approx(row["model_flops_per_second"] / 1e6)
    assert (tmp_path / "log.jsonl").read_bytes() == unbroken[2]


def test_a_profile_traces_the_requested_steps(tmp_path):
    with loop.profiled((3, 4)):
        fit(tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    fit(tmp_path / "without")
    assert not (tmp_path / "without" / "profile").exists()


def test_averages_resume_exactly():
    """Although they are stored as text."""
    rng = np.random.default_rng(0)
    sums = [
        {
            "a": (jnp.float32(rng.normal()), jnp.float32(3)),
            "b": (jnp.asarray(rng.normal(size=4), jnp.float32), jnp.float32(1)),
        }
        for _ in range(5)
    ]
    whole, first, second = (
        train_metrics.Averages(),
        train_metrics.Averages(),
        train_metrics.Averages(),
    )
    for each in sums:
        whole.add(each)
    for each in sums[:3]:
        first.add(each)
    second.from_json(json.loads(json.dumps(first.to_json())))
    for each in sums[3:]:
        second.add(each)
    assert_same(second.pop(), whole.pop())


def test_records_of_skipped_batches_are_named(tmp_path):
    """The message lists the first ones, a file next to the log all of them, by batch."""
    batches = begin()["iterator"]
    drawn = [next(batches)["records"].tolist() for _ in range(6)][2:]
    with pytest.raises(FloatingPointError) as caught:
        fit_guarded(tmp_path, 3, 8)
    named = dict.fromkeys(record for records in drawn for record in records)
    assert f"(records {', '.join(map(str, named))}; " in str(caught.value)
    found = json.loads((tmp_path / "skipped.json").read_text())
    assert found == {str(3 + i): records for i, records in enumerate(drawn)}


def test_a_full_disk_is_reported_and_loses_no_checkpoint(tmp_path, monkeypatch):
    """The write fails in the background, so the next save, or the end, reports it."""

    async def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(checkpoint._IteratorState):
        async def save(self, directory):
            write = await super().save(directory)
            if self._iterator.get_state()["next_index"] < 8:
                return write
            write.close()
            return fail()

    monkeypatch.setattr(checkpoint, "_IteratorState", Full)
    with pytest.raises(UserError, match=r"the disk is full\); the one of step 4 is kept") as caught:
        fit(tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    state, rows, _ = fit(tmp_path)
    assert state.step == 8 and len(rows) == 4
