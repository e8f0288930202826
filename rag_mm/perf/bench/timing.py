"""Interleaved timing of several calls, so that a slow phase of the machine affects all of them."""

import contextlib
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

LEAST_ROUNDS = 6  # With five values, even their range has a coverage below 95 %.


def alternate(
    calls: Sequence[Callable[[], object]], num_rounds: int, is_warm: bool = False
) -> list[float]:
    """Median seconds of each call; see `rounds`."""
    return [statistics.median(times) for times in rounds(calls, num_rounds, is_warm)]


def rounds(
    calls: Sequence[Callable[[], object]], num_rounds: int, is_warm: bool = False
) -> list[list[float]]:
    """Seconds per call and round. Every round runs all calls once, after one uncounted round.

    With `is_warm`, each call runs twice in a row and the second run is timed, as in training, where a step
    follows a step. This excludes effects of the other call, such as memory that another library freed.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for round_number in range(num_rounds + 1):
        for i, call in enumerate(calls):
            if round_number and is_warm:
                call()
            start = time.perf_counter()
            call()
            if round_number:
                seconds[i].append(time.perf_counter() - start)
    return seconds


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % confidence interval of the median: two order statistics.

    The true median is outside the k-th smallest and k-th largest of n values with probability 2 P(X < k), X
    binomial (n, 1/2); k is the largest one for which that is at most 5 %.

    Raises:
        ValueError: fewer than LEAST_ROUNDS values.
    """
    count = len(values)
    if count < LEAST_ROUNDS:
        raise ValueError(
            f"{count} values are too few for a 95 % interval; give at least {LEAST_ROUNDS}"
        )
    k, outside = 0, 2 / 2**count  # No scipy: this also runs on images with little beyond jax.
    while outside <= 0.05:
        k += 1
        outside += 2 * math.comb(count, k) / 2**count
    ordered = sorted(values)
    return ordered[k - 1], ordered[count - k]


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Restricts the process to `count` CPUs within the context (Linux).

    XLA sizes its thread pool when it starts, so call this before the first JAX operation.
    """
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


def reset_peak_memory() -> None:
    """Resets the peak resident memory of the process (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def resident_memory(peak: bool) -> int:
    """Resident bytes: current, or the peak since the last reset (Linux)."""
    key = "VmHWM:" if peak else "VmRSS:"
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
