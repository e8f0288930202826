"""Looks up numbers in nested metrics and formats them; a missing one stays missing."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rag_mm.eval import statistics

MISSING = "not measured"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number; `ci95` is the half width of its 95 % interval over `n` samples, if it has one."""

    value: float
    ci95: float | None = None
    n: int | None = None

    @property
    def standard_error(self) -> float | None:
        """The standard error behind `ci95`, or None."""
        return None if self.ci95 is None else self.ci95 / statistics.Z95


def find(metrics: Mapping[str, Any], path: str) -> Figure | None:
    """The figure at a dotted path, a number or {"accuracy" or "mean", "ci95", "n"}; else None."""
    node: Any = metrics
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return as_measured(node)


def as_measured(node: Any) -> Figure | None:
    """`node` of the metrics as a figure, or None if it is not a finite number."""
    if isinstance(node, Mapping):
        value = node.get("accuracy", node.get("mean"))
        ci95, n = node.get("ci95"), node.get("n")
    else:
        value, ci95, n = node, None, None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return Figure(float(value), ci95, n)


def percent(figure: Figure | None) -> str:
    """A fraction as "62.1 % ± 5.9"."""
    if figure is None:
        return MISSING
    error = "" if figure.ci95 is None else f" ± {100 * figure.ci95:.1f}"
    return f"{100 * figure.value:.1f} %{error}"


def number(figure: Figure | None, digits: int = 2, unit: str = "") -> str:
    """A figure as "5.41 ± 0.12 nats"."""
    if figure is None:
        return MISSING
    error = "" if figure.ci95 is None else f" ± {figure.ci95:.{digits}f}"
    return f"{figure.value:.{digits}f}{error}{unit and ' ' + unit}"


def duration(seconds: float) -> str:
    """Seconds as "19 min 40 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_seconds:02d} s" if minutes else f"{whole_seconds} s"


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every number of the metrics as (dotted path, text), sorted by path."""
    rows: list[tuple[str, str]] = []
    for key in sorted(metrics):
        node, path = metrics[key], f"{prefix}{key}"
        if isinstance(node, Mapping) and as_measured(node) is None:
            rows += flatten(node, f"{path}.")
        elif isinstance(node, Mapping):
            figure = as_measured(node)
            assert figure is not None
            error = "" if figure.ci95 is None else f" ± {figure.ci95:.4g}"
            count = "" if figure.n is None else f" (n = {figure.n})"
            rows.append((path, f"{figure.value:.4g}{error}{count}"))
        else:
            rows.append((path, f"{node:.6g}" if isinstance(node, float) else str(node)))
    return rows
