"""Averages of training metrics from (sum, weight) pairs, the JSON-lines log, and TensorBoard."""

import contextlib
import importlib.util
import json
from collections.abc import Mapping

import jax
import numpy as np
from clu import metrics as clu_metrics
from etils import epath

from rag_mm.core import files


class Averages:
    """Accumulates (sum, weight) pairs on the device; `pop` fetches them once."""

    def __init__(self) -> None:
        self._totals: dict[str, clu_metrics.Average] = {}

    def add(self, metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
        """Adds one step's (sum, weight) pairs; a sum may be an array, such as counts per code."""
        for name, (total, weight) in metrics.items():
            new = clu_metrics.Average(total=total, count=weight)
            old = self._totals.get(name)
            self._totals[name] = new if old is None else old.merge(new)

    def to_json(self) -> dict[str, list]:
        """The sums so far, exactly, for `from_json` in a resumed run."""
        totals = jax.device_get({k: (m.total, m.count) for k, m in self._totals.items()})
        return {k: [np.asarray(x, np.float32).tolist() for x in pair] for k, pair in totals.items()}

    def from_json(self, values: Mapping[str, list]) -> None:
        """Restores the sums that `to_json` returned."""
        for name, pair in values.items():
            total, weight = (np.asarray(x, np.float32) for x in pair)
            self._totals[name] = clu_metrics.Average(total=total, count=weight)

    def pop(self) -> dict[str, np.ndarray]:
        """sum / weight of everything added since the last call; 0 where the weight is 0."""
        totals = jax.device_get({k: (m.total, m.count) for k, m in self._totals.items()})
        self._totals = {}
        return {k: np.where(w == 0, 0, t / np.maximum(w, 1e-9)) for k, (t, w) in totals.items()}


class Log:
    """A stage's log of JSON lines, one per logged step; lines after the step a run resumes from are dropped.

    With several processes only process 0 writes the file; all have `rows`.
    """

    def __init__(self, path: epath.PathLike, resumed_step: int, digits: int = 6):
        self._path, self._digits = epath.Path(path), digits
        self.rows = [row for row in read_log(path) if row["step"] <= resumed_step]

    def write(self, step: int, values: Mapping[str, np.ndarray | float]) -> None:
        """Appends the scalars in `values`. The file is replaced atomically, so it never has half a line."""
        scalars = {k: round(float(v), self._digits) for k, v in values.items() if np.ndim(v) == 0}
        self.rows.append({"step": step, **scalars})
        if jax.process_index() == 0:
            text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.rows)
            files.write_atomic(self._path, text.encode())


def read_log(path: epath.PathLike) -> list[dict[str, float]]:
    """The lines of a log, oldest first; empty if the file does not exist.

    A log stops neither a resumed training nor a report: lines that cannot be read, and values that are no
    finite numbers, are left out.
    """
    path = epath.Path(path)
    if files.is_special(path) or not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            row = files.parse_json(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append({k: v for k, v in row.items() if type(v) in (int, float)})
    return rows


def scalars(**groups: Mapping[str, np.ndarray | float]) -> dict[str, float]:
    """The scalars of each group as `group/name`."""
    return {
        f"{group}/{name}": float(value)
        for group, values in groups.items()
        for name, value in values.items()
        if np.ndim(value) == 0 and name != "step"
    }


class Board:
    """Writes the logged metrics for TensorBoard if the extra [tf] is installed; otherwise does nothing."""

    def __init__(self, folder: epath.PathLike):
        self._writer = None
        has_all = all(map(importlib.util.find_spec, ("tensorflow", "tensorboard")))
        if has_all and jax.process_index() == 0:
            from clu.metric_writers import SummaryWriter

            self._writer = SummaryWriter(str(folder))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars, and flushes them to disk."""
        if self._writer is None:
            return
        self._writer.write_scalars(step, scalars)
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the writer."""
        if self._writer is not None:
            self._writer.close()
