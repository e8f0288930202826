"""Averages are sums divided once by their weights; a log resumes where its run does."""

import importlib.util
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rag_mm.train import train_metrics


def test_averages_are_weighted_by_weight_not_by_step():
    averages = train_metrics.Averages()
    averages.add({"loss": (jnp.float32(10), jnp.float32(1))})
    averages.add(
        {"loss": (jnp.float32(2), jnp.float32(3)), "late": (jnp.float32(4), jnp.float32(8))}
    )
    found = averages.pop()
    assert {name: float(value) for name, value in found.items()} == {"loss": 3.0, "late": 0.5}
    assert averages.pop() == {}


def test_nothing_to_average_is_zero_and_not_nan():
    averages = train_metrics.Averages()
    averages.add({"code_nll": (jnp.float32(0), jnp.float32(0))})
    assert averages.pop()["code_nll"] == 0


def test_not_a_number_stays_visible():
    averages = train_metrics.Averages()
    averages.add({"loss": (jnp.float32(np.nan), jnp.float32(2))})
    averages.add({"loss": (jnp.float32(1), jnp.float32(2))})
    assert np.isnan(averages.pop()["loss"])


def test_sums_may_be_arrays():
    averages = train_metrics.Averages()
    for counts in ([1, 0, 3], [1, 2, 0]):
        averages.add({"usage": (jnp.array(counts, jnp.float32), jnp.float32(2))})
    np.testing.assert_allclose(averages.pop()["usage"], [0.5, 0.5, 0.75])


def test_a_log_drops_lines_after_the_resumed_step(tmp_path):
    path = tmp_path / "log.jsonl"
    log = train_metrics.Log(path, 0)
    for step in (2, 4, 6):
        log.write(step, {"loss": np.float32(step / 3), "usage": np.ones(3)})
    rows = train_metrics.read_log(path)
    assert rows == log.rows == [{"step": s, "loss": round(s / 3, 6)} for s in (2, 4, 6)]
    resumed = train_metrics.Log(path, 4)
    assert resumed.rows == rows[:2]
    resumed.write(6, {"loss": np.float32(0)})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()][2] == 0


def test_without_a_file_a_log_is_empty(tmp_path):
    assert train_metrics.read_log(tmp_path / "log.jsonl") == []


def test_without_tensorflow_there_is_no_board(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    board = train_metrics.Board(tmp_path / "tensorboard")
    board.write(2, {"train/loss": 1.0})
    board.close()
    assert not (tmp_path / "tensorboard").exists()


def test_the_board_gets_the_scalars_of_the_log(tmp_path, monkeypatch):
    """CLU's writer requires TensorFlow, so a stub replaces it."""
    written = []
    writer = types.SimpleNamespace(
        write_scalars=lambda step, scalars: written.append((step, scalars)),
        flush=lambda: None,
        close=lambda: None,
    )
    module = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "clu.metric_writers", module)
    monkeypatch.setattr(sys.modules["clu"], "metric_writers", module, raising=False)
    board = train_metrics.Board(tmp_path / "tensorboard")
    values = {"loss": np.float32(0.5), "usage": np.ones(3)}
    board.write(4, train_metrics.scalars(train=values, speed={"step": 4, "mfu": 0.25}))
    assert written == [(4, {"train/loss": 0.5, "speed/mfu": 0.25})]


@pytest.mark.slow
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorflow")
    from tensorboard.backend.event_processing import event_accumulator

    board = train_metrics.Board(tmp_path)
    for step in (2, 4):
        board.write(step, {"train/loss": 1 / step})
    board.close()
    found = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    found.Reload()
    assert [event.step for event in found.Tensors("train/loss")] == [2, 4]
