"""Times of two things done by turns, so that what slows the machine slows both."""

import pathlib
import statistics
import time
from collections.abc import Callable, Sequence


def alternate(calls: Sequence[Callable[[], object]], num_rounds: int) -> list[float]:
    """The median seconds of each call, all of them once a round, after a round that is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for count in range(num_rounds + 1):
        for place, call in enumerate(calls):
            began = time.perf_counter()
            call()
            if count:
                seconds[place].append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds]


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
