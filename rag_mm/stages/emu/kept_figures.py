"""Figures of a stage that measures part by part: what is kept, and the summary of what was found."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files
from rag_mm.eval import breakdown, statistics
from rag_mm.stages.emu.rollout_figures import Values


def once(path: epath.Path, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `make` returned, written by an earlier call or now."""
    if not path.exists():
        files.write_json(path, make())
    return files.read_object(path)


def summary(
    values: Mapping[str, Mapping[str, Any]],
    shares: Collection[str],
    pairs: Iterable[tuple[str, str, str]],
) -> dict[str, Any]:
    """Means by figure and variant with their intervals, and paired differences.

    Args:
        values: by variant and figure, one value per document.
        shares: figures that are 0 or 1.
        pairs: (figure, ours, theirs), as for `breakdown.paired`.
    """
    arrays = {
        variant: {name: np.array(each) for name, each in figures.items()}
        for variant, figures in values.items()
    }
    found: dict[str, Any] = {}
    for variant, figures in arrays.items():
        for name, each in figures.items():
            mean = statistics.accuracy if name in shares else statistics.mean
            found.setdefault(name, {})[variant] = mean(each, name)
    return found | {"paired": breakdown.paired(arrays, pairs)}


def lists(*values: Values) -> dict[str, dict[str, list[float]]]:
    """Values of the same variants as plain lists."""
    merged: dict[str, dict[str, list[float]]] = {}
    for each in values:
        for variant, figures in each.items():
            lists = {name: array.tolist() for name, array in figures.items()}
            merged.setdefault(variant, {}).update(lists)
    return merged
