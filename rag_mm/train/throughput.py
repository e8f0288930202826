"""Training speed: step times, tokens and FLOPs per second, and the share of time spent waiting for input.

MFU is model FLOPs per second (`rag_mm.perf.flops`: six per weight and token, causal attention, nothing for
rematerialization) over the published peak of all chips. Speed differs between two bitwise identical runs, so
it has its own file.
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
    """FLOPs of a step as a function of the batch, and the published peak of all devices in FLOP/s, if any."""

    flops: Callable[[Mapping[str, Any]], float]
    peak: float | None = None


class Speed:
    """Times the training loop; writes one JSON line to `path` per log line."""

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
        """Adds time spent waiting for a batch."""
        self._waited += seconds

    def step(self, batch: Mapping[str, Any]) -> None:
        """Reports that a step on `batch` has finished."""
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now
        if "tokens" in batch:
            self._num_tokens += math.prod(batch["tokens"].shape)
        if self._cost is not None:
            self._flops += self._cost.flops(batch)

    def write(self, step: int) -> dict[str, float]:
        """Appends the figures since the last call to the file, and returns them.

        Returns:
            step; step_seconds_p50 and _p99 in s; input_wait as a share of the time, 0 to 1; and, where
            known, tokens_per_second, model_flops_per_second and mfu.
        """
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
        """Excludes the time since the last step, such as for saving."""
        self._last = time.monotonic()
