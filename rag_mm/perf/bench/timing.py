"""Interleaved timing of several calls, so that a slow phase of the machine affects all of them."""

import contextlib
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

LEAST_ROUNDS = 6  # Of five values not even the extremes hold the median with 95 %.


def alternate(
    calls: Sequence[Callable[[], object]], num_rounds: int, is_warm: bool = False
) -> list[float]:
    """The median seconds of each call; see `rounds`."""
    return [statistics.median(times) for times in rounds(calls, num_rounds, is_warm)]


def rounds(
    calls: Sequence[Callable[[], object]], num_rounds: int, is_warm: bool = False
) -> list[list[float]]:
    """The seconds of each call in each round, all of them once a round, after one that is not counted.

    With `is_warm` each is made twice in its turn and the second counts: steps follow steps of their own kind
    in a run too, and what another library leaves behind, such as memory given back, is not theirs.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for count in range(num_rounds + 1):
        for place, call in enumerate(calls):
            if count and is_warm:
                call()
            began = time.perf_counter()
            call()
            if count:
                seconds[place].append(time.perf_counter() - began)
    return seconds


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, whatever the values' distribution: two of the values themselves.

    The median lies outside the k-th least and the k-th greatest value as often as a fair coin shows heads
    fewer than k times or more than n - k; k is the largest for which that is at most 5 %.

    Raises:
        ValueError: fewer than LEAST_ROUNDS values.
    """
    count = len(values)
    if count < LEAST_ROUNDS:
        raise ValueError(f"{count} values have no such interval, give at least {LEAST_ROUNDS}")
    k, outside = 0, 2 / 2**count
    while outside <= 0.05:
        k += 1
        outside += 2 * math.comb(count, k) / 2**count
    ordered = sorted(values)
    return ordered[k - 1], ordered[count - k]


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Lets the process use so many processors while the body runs (Linux).

    XLA makes as many threads as it may use processors when it starts, so it must not have started before.
    """
    used = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, used[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, used)


def reset_peak_memory() -> None:
    """Forgets the process's peak of resident memory (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def resident_memory(peak: bool) -> int:
    """Bytes that are resident now, or were at most since the last reset (Linux)."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
