"""Sums and weights from training steps, folded into averages and a log of JSON lines."""

import json
from collections.abc import Mapping

import jax
import numpy as np
from clu import metrics as clu_metrics
from etils import epath

from rag_mm.core import files


class Averages:
    """Adds up (sum, weight) pairs on the device; one fetch when the averages are asked for."""

    def __init__(self) -> None:
        self._totals: dict[str, clu_metrics.Average] = {}

    def add(self, metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
        """Adds one step's sums; a sum may be an array (such as counts per code)."""
        for name, (total, weight) in metrics.items():
            new = clu_metrics.Average(total=total, count=weight)
            old = self._totals.get(name)
            self._totals[name] = new if old is None else old.merge(new)

    def to_json(self) -> dict[str, list]:
        """The sums so far, exactly, for `from_json` of a process that goes on."""
        totals = jax.device_get({k: (m.total, m.count) for k, m in self._totals.items()})
        return {k: [np.asarray(x, np.float32).tolist() for x in pair] for k, pair in totals.items()}

    def from_json(self, values: Mapping[str, list]) -> None:
        """Takes up sums where another process left them."""
        for name, pair in values.items():
            total, weight = (np.asarray(x, np.float32) for x in pair)
            self._totals[name] = clu_metrics.Average(total=total, count=weight)

    def pop(self) -> dict[str, np.ndarray]:
        """sum / weight of everything added since the last call; 0 where the weight is 0."""
        totals = jax.device_get({k: (m.total, m.count) for k, m in self._totals.items()})
        self._totals = {}
        return {k: np.where(w == 0, 0, t / np.maximum(w, 1e-9)) for k, (t, w) in totals.items()}


class Log:
    """`log.jsonl` of a stage: one object per logged step, cut back to the step a run resumes from."""

    def __init__(self, path: epath.PathLike, resumed_step: int):
        self._path = epath.Path(path)
        self.rows = [row for row in read_log(path) if row["step"] <= resumed_step]

    def write(self, step: int, values: Mapping[str, np.ndarray | float]) -> None:
        """Appends the scalars among `values`; the file is replaced whole, so it is never half a line."""
        scalars = {k: round(float(v), 6) for k, v in values.items() if np.ndim(v) == 0}
        self.rows.append({"step": step, **scalars})
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.rows)
        files.write_atomic(self._path, text.encode())


def read_log(path: epath.PathLike) -> list[dict[str, float]]:
    """The rows of a log, oldest first; empty if there is none yet."""
    path = epath.Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
