"""Speed figures of a run, with a simulated clock."""

import numpy as np
import pytest

from rag_mm.train import throughput


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(throughput.time, "monotonic", lambda: Clock.now)
    return Clock


BATCH = {"tokens": np.zeros((4, 25), np.int32)}


def test_times_rates_and_shares(clock, tmp_path):
    cost = throughput.Cost(lambda batch: 10.0 * batch["tokens"].size, peak=4000.0)
    watch = throughput.Speed(tmp_path / "speed.jsonl", 0, cost)
    for seconds in (1.0, 1.0, 1.0, 5.0):
        clock.now += seconds
        watch.wait(0.5)
        watch.step(BATCH)
    row = watch.write(4)
    assert row["step_seconds_p50"] == 1.0 and 4.5 < row["step_seconds_p99"] <= 5.0
    assert row["input_wait"] == pytest.approx(2 / 8)
    assert row["tokens_per_second"] == pytest.approx(400 / 8)
    assert row["model_flops_per_second"] == pytest.approx(4000 / 8)
    assert row["mfu"] == pytest.approx(4000 / 8 / 4000)


def test_saving_is_excluded_from_step_times_and_each_log_line_starts_from_zero(clock, tmp_path):
    watch = throughput.Speed(tmp_path / "speed.jsonl", 0)
    clock.now += 1
    watch.step(BATCH)
    watch.write(1)
    clock.now += 100
    watch.restart()
    clock.now += 2
    watch.step({"x": np.zeros(3)})
    row = watch.write(2)
    assert row["step_seconds_p50"] == 2.0
    assert row.keys() == {"step", "step_seconds_p50", "step_seconds_p99", "input_wait"}


def test_a_resumed_run_drops_later_lines(clock, tmp_path):
    path = tmp_path / "speed.jsonl"
    watch = throughput.Speed(path, 0)
    for step in (2, 4, 6):
        clock.now += 1
        watch.step(BATCH)
        watch.write(step)
    assert [row["step"] for row in throughput.Speed(path, 4).rows] == [2, 4]
    assert path.read_text().count("\n") == 3
