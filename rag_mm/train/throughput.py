"""Training speed: step times, tokens and FLOPs per second, and the share of time spent waiting for input.

MFU is model FLOPs per second (`rag_mm.perf.flops`: six per weight and token, causal attention, nothing for
rematerialization) over the published peak of all chips. Padding counts neither as tokens nor as FLOPs. Speed
differs between two bitwise identical runs, so it has its own file.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.train import train_metrics


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a decoder's training step costs.

    Attributes:
        flops: lengths of segments in tokens, float64 [...] -> FLOPs of a step on each, float64 [...].
        peak: published peak of all devices in FLOP/s; None if there is none.
    """

    flops: Callable[[np.ndarray], np.ndarray]
    peak: float | None = None


def segment_lengths(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tokens in each segment of each row of a decoder's batch, float64 [B, S]; padding (id 0) is in none.

    A batch without `segment_ids` has no padding.
    """
    num_rows, length = batch["tokens"].shape
    if "segment_ids" not in batch:
        return np.full((num_rows, 1), float(length))
    ids = batch["segment_ids"]
    num_ids = ids.max() + 1
    cells = ids + num_ids * np.arange(num_rows)[:, None]
    counts = np.bincount(cells.ravel(), minlength=num_rows * num_ids).reshape(num_rows, num_ids)
    return counts[:, 1:].astype(np.float64)


class Speed:
    """Times the training loop; writes one JSON line to `path` per log line.

    Args:
        path: the file.
        resumed_step: lines after this step are dropped.
        cost: counts tokens and FLOPs; None for models that are no decoders, whose lines have neither.
        sum_rows: adds up one value for each row of a batch, float64 [B], over the rows of all processes.
    """

    def __init__(
        self,
        path: epath.PathLike,
        resumed_step: int,
        cost: Cost | None = None,
        sum_rows: Callable[[np.ndarray], float] = np.sum,
    ):
        self._log = train_metrics.Log(path, resumed_step, digits=15)
        self._cost, self._sum_rows = cost, sum_rows
        self.rows = self._log.rows
        self._last = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._seconds: list[float] = []
        self._waited = 0.0
        self._tokens = self._flops = self._places = np.zeros(1)  # By row of this process.

    def load(self, batch: Mapping[str, Any], seconds: float) -> None:
        """Reports a batch, this process's rows on the host, that the loop waited for; before its `step`."""
        self._waited += seconds
        if self._cost is not None:
            lengths = segment_lengths(batch)
            self._tokens = self._tokens + lengths.sum(axis=1)
            self._flops = self._flops + self._cost.flops(lengths).sum(axis=1)
            self._places = self._places + np.full(len(lengths), float(batch["tokens"].shape[1]))

    def step(self) -> None:
        """Reports that a step has finished."""
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now

    def write(self, step: int) -> dict[str, float]:
        """Appends the figures since the last call to the file, and returns them.

        Returns:
            step; step_seconds_p50 and _p99 in s; input_wait as a share of the time, 0 to 1; and, where
            known, tokens_per_second and model_flops_per_second of all processes, row_fill, the share of the
            tokens in rows that are no padding, and mfu.
        """
        total = max(sum(self._seconds), 1e-9)
        row = {
            "step_seconds_p50": float(np.percentile(self._seconds, 50)),
            "step_seconds_p99": float(np.percentile(self._seconds, 99)),
            "input_wait": self._waited / total,
        }
        if self._cost is not None:
            tokens = self._sum_rows(self._tokens)
            row["tokens_per_second"] = tokens / total
            row["row_fill"] = tokens / max(self._sum_rows(self._places), 1.0)
            row["model_flops_per_second"] = self._sum_rows(self._flops) / total
            if self._cost.peak is not None:
                row["mfu"] = row["model_flops_per_second"] / self._cost.peak
        self._log.write(step, row)
        self._clear()
        return {"step": step, **row}

    def restart(self) -> None:
        """Excludes the time since the last step, such as for saving."""
        self._last = time.monotonic()
