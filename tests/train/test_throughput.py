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
COST = throughput.Cost(lambda lengths: 10.0 * lengths, peak=4000.0)


def test_times_rates_and_shares(clock, tmp_path):
    watch = throughput.Speed(tmp_path / "speed.jsonl", 0, COST)
    for seconds in (1.0, 1.0, 1.0, 5.0):
        clock.now += seconds
        watch.load(BATCH, 0.5)
        watch.step()
    row = watch.write(4)
    assert row["step_seconds_p50"] == 1.0 and 4.5 < row["step_seconds_p99"] <= 5.0
    assert row["input_wait"] == pytest.approx(2 / 8)
    assert row["tokens_per_second"] == pytest.approx(400 / 8)
    assert row["model_flops_per_second"] == pytest.approx(4000 / 8)
    assert row["mfu"] == pytest.approx(4000 / 8 / 4000)


def rates(clock, path, *batches, **options):
    """Tokens and FLOPs per second where every step takes a second."""
    watch = throughput.Speed(path, 0, COST, **options)
    for batch in batches:
        clock.now += 1
        watch.load(batch, 0.0)
        watch.step()
    row = watch.write(len(batches))
    assert row["mfu"] == row["model_flops_per_second"] / 4000
    return row["tokens_per_second"], row["model_flops_per_second"]


def test_padding_counts_as_nothing(clock, tmp_path):
    segment_ids = np.ones((4, 26), np.int32)
    full = {"tokens": np.zeros((4, 26), np.int32), "segment_ids": segment_ids}
    half = full | {"segment_ids": segment_ids * (np.arange(26) < 13)}
    left = full | {"segment_ids": segment_ids * (np.arange(26) >= 13)}
    empty = full | {"segment_ids": 0 * segment_ids}
    assert rates(clock, tmp_path / "full", full, full) == pytest.approx((104, 1040))
    assert rates(clock, tmp_path / "half", half, half) == pytest.approx((52, 520))
    assert rates(clock, tmp_path / "left", left, full) == pytest.approx((78, 780))
    assert rates(clock, tmp_path / "empty", empty) == (0, 0)


def test_the_fill_is_the_share_of_places_with_a_token(clock, tmp_path):
    segment_ids = np.ones((4, 26), np.int32)
    segment_ids[:2, 13:] = 0
    watch = throughput.Speed(tmp_path / "speed.jsonl", 0, COST)
    for ids in (segment_ids, np.ones((4, 26), np.int32)):
        watch.load({"tokens": np.zeros((4, 26), np.int32), "segment_ids": ids}, 0.0)
        watch.step()
    assert watch.write(2)["row_fill"] == pytest.approx((0.75 + 1.0) / 2)


def test_lengths_are_those_of_segments():
    """Attention does not cross segments, so a packed row costs as much as its segments."""
    segment_ids = np.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1], [0] * 6], np.int32)
    batch = {"tokens": np.zeros((3, 6), np.int32), "segment_ids": segment_ids}
    lengths = throughput.segment_lengths(batch)
    assert lengths.tolist() == [[3, 2], [4, 0], [0, 0]]
    del batch["segment_ids"]
    assert throughput.segment_lengths(batch).tolist() == [[6]] * 3


def test_rows_of_other_processes_are_added(clock, tmp_path):
    """Batches of several lengths have one count for each row."""
    seen = []

    def add(values):
        seen.append(values.tolist())
        return 3 * values.sum()  # As if three processes had the same.

    short = {"tokens": np.zeros((4, 5), np.int32)}
    tokens, work = rates(clock, tmp_path / "speed.jsonl", BATCH, short, sum_rows=add)
    assert seen == [[30.0] * 4, [30.0] * 4, [300.0] * 4]  # Tokens, places for them, and FLOPs.
    assert (tokens, work) == pytest.approx((3 * 120 / 2, 3 * 1200 / 2))


def test_saving_is_excluded_from_step_times_and_each_log_line_starts_from_zero(clock, tmp_path):
    watch = throughput.Speed(tmp_path / "speed.jsonl", 0)
    clock.now += 1
    watch.step()
    watch.write(1)
    clock.now += 100
    watch.restart()
    clock.now += 2
    watch.load({"x": np.zeros(3)}, 0.0)
    watch.step()
    row = watch.write(2)
    assert row["step_seconds_p50"] == 2.0
    assert row.keys() == {"step", "step_seconds_p50", "step_seconds_p99", "input_wait"}


def test_a_resumed_run_drops_later_lines(clock, tmp_path):
    path = tmp_path / "speed.jsonl"
    watch = throughput.Speed(path, 0)
    for step in (2, 4, 6):
        clock.now += 1
        watch.step()
        watch.write(step)
    assert [row["step"] for row in throughput.Speed(path, 4).rows] == [2, 4]
    assert path.read_text().count("\n") == 3
