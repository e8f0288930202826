"""Figures of variants compared: differences paired by test document, and means within groups of documents."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rag_mm.eval import scene_accuracy, statistics

# {variant: {figure: [Q]}}, one value a test document.
Values = Mapping[str, Mapping[str, np.ndarray]]


def paired(values: Values, pairs: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, Any]]:
    """`FIGURE_OURS_minus_THEIRS` as `statistics.paired_difference` gives it.

    Args:
        values: all variants' figures of the same documents.
        pairs: (figure, ours, theirs); pairs of which a side was not measured are left out.
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
    """Within each group: `FIGURE.VARIANT` as an accuracy or a mean, `paired`, and the count `n`.

    Args:
        values: all variants' figures of the same Q documents.
        groups: Q names. A group of one document is left out: it has no interval.
        pairs: as in `paired`.
    """
    pairs, result = list(pairs), {}
    for group in sorted(set(groups)):
        chosen = np.flatnonzero(np.asarray(groups) == group)
        if len(chosen) < 2:
            continue
        own = {v: {f: each[chosen] for f, each in figs.items()} for v, figs in values.items()}
        found: dict[str, Any] = {"n": len(chosen), "paired": paired(own, pairs)}
        for variant, figures in own.items():
            for figure, each in figures.items():
                is_fact = figure in scene_accuracy.FACTS
                summary = statistics.accuracy(each) if is_fact else statistics.mean(each)
                name = f"{figure}_accuracy" if is_fact else figure
                found.setdefault(name, {})[variant] = summary
        result[group] = found
    return result
