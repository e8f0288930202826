"""How fast a run goes: step times, tokens and FLOPs a second, and the share of time spent waiting for input.

MFU is model FLOPs (`rag_mm.perf.flops`: six a multiplied weight and token, causal attention, nothing for what
is computed again) over the published peak of all chips. These figures differ between two runs of the same
bits, so they have a file of their own.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.train import train_metrics


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of a step on a batch, and the peak of all devices together in FLOP/s where it is published."""

    flops: Callable[[Mapping[str, Any]], float]
    peak: float | None = None


class Speed:
    """A stop watch around the loop; `path` gets one JSON object per log."""

    def __init__(self, path: epath.PathLike, resumed_step: int, cost: Cost | None = None):
        self._log = train_metrics.Log(path, resumed_step, digits=15)
        self._cost = cost
        self.rows = self._log.rows
        self._last = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._seconds: list[float] = []
        self._waited = self._num_tokens = self._flops = 0.0

    def wait(self, seconds: float) -> None:
        """Adds time that was spent on getting a batch."""
        self._waited += seconds

    def step(self, batch: Mapping[str, Any]) -> None:
        """Says that one more step on `batch` is finished."""
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now
        if "tokens" in batch:
            self._num_tokens += math.prod(batch["tokens"].shape)
        if self._cost is not None:
            self._flops += self._cost.flops(batch)

    def write(self, step: int) -> dict[str, float]:
        """Figures since the last call, as they are appended to the file."""
        total = max(sum(self._seconds), 1e-9)
        row = {
            "step_seconds_p50": float(np.percentile(self._seconds, 50)),
            "step_seconds_p99": float(np.percentile(self._seconds, 99)),
            "input_wait": self._waited / total,
        }
        if self._num_tokens:
            row["tokens_per_second"] = self._num_tokens / total
        if self._cost is not None:
            row["model_flops_per_second"] = self._flops / total
            if self._cost.peak is not None:
                row["mfu"] = self._flops / total / self._cost.peak
        self._log.write(step, row)
        self._clear()
        return {"step": step, **row}

    def restart(self) -> None:
        """Leaves out what was done since the last step, such as saving."""
        self._last = time.monotonic()
