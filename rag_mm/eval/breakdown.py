"""Comparing variants: differences paired by test document, and means within groups of documents."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rag_mm.eval import scene_accuracy, statistics

# {variant: {metric: [Q]}}, one value per test document.
Values = Mapping[str, Mapping[str, np.ndarray]]


def paired(values: Values, pairs: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, Any]]:
    """Paired differences by name, `METRIC_OURS_minus_THEIRS`; see `statistics.paired_difference`.

    Args:
        values: every variant's metrics on the same documents.
        pairs: (metric, ours, theirs); a pair with an unmeasured side is skipped.
    """
    return {
        f"{figure}_{ours}_minus_{theirs}": statistics.paired_difference(
            values[ours][figure], values[theirs][figure]
        )
        for figure, ours, theirs in pairs
        if figure in values.get(ours, {}) and figure in values.get(theirs, {})
    }


def by_group(
    values: Values, groups: Sequence[str], pairs: Iterable[tuple[str, str, str]]
) -> dict[str, dict[str, Any]]:
    """For each group: `METRIC.VARIANT` as an accuracy or a mean, `paired`, and the count `n`.

    Args:
        values: every variant's metrics on the same Q documents.
        groups: Q group names. A group of one document is skipped: it has no confidence interval.
        pairs: as in `paired`.
    """
    pairs = list(pairs)
    result: dict[str, dict[str, Any]] = {}
    for group in sorted(set(groups)):
        rows = np.flatnonzero(np.asarray(groups) == group)
        if len(rows) < 2:
            continue
        members = {
            variant: {metric: array[rows] for metric, array in metrics.items()}
            for variant, metrics in values.items()
        }
        result[group] = {"n": len(rows), "paired": paired(members, pairs)}
        for variant, metrics in members.items():
            for metric, array in metrics.items():
                is_fact = metric in scene_accuracy.FACTS
                summary = statistics.accuracy(array) if is_fact else statistics.mean(array)
                name = f"{metric}_accuracy" if is_fact else metric
                result[group].setdefault(name, {})[variant] = summary
    return result
