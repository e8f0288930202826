"""Selects the test documents that a report shows, by a fixed rule that does not depend on outcomes."""

import numpy as np


def first_of_each_class(class_ids: np.ndarray) -> np.ndarray:
    """Indices of the first document of each class, int64, ascending.

    Args:
        class_ids: int [Q], the class of each document.
    """
    return np.sort(np.unique(class_ids, return_index=True)[1])


def choose(
    class_ids: np.ndarray, is_flag: np.ndarray, num_flags: int, num_others: int
) -> np.ndarray:
    """One test document per class: `num_flags` flags and `num_others` others, evenly spaced.

    Evenly spaced because documents are ordered by class name: the first few are all signs and buttons.

    Args:
        class_ids: int [Q], the class of each document.
        is_flag: bool [Q].
        num_flags: maximal number of flags.
        num_others: maximal number of other classes.

    Returns:
        int64 indices, ascending.
    """
    first = first_of_each_class(class_ids)
    flags, others = first[is_flag[first]], first[~is_flag[first]]
    return np.sort(
        np.concatenate([_evenly_spaced(flags, num_flags), _evenly_spaced(others, num_others)])
    )


def rule(num_flags: int, num_others: int) -> str:
    """The sentence that states the rule of `choose` and how many it selected."""
    counts = [
        f"{count} {name}{'s' * (count > 1)}"
        for count, name in ((num_flags, "flag"), (num_others, "other"))
        if count
    ]
    return (
        f"Selected by a fixed rule, not by outcome: {' and '.join(counts)}, evenly spaced over the list of "
        f"held-out classes, each with its first test document."
    )


def _evenly_spaced(indices: np.ndarray, count: int) -> np.ndarray:
    count = min(count, len(indices))
    return indices[np.linspace(0, len(indices) - 1, count).round().astype(np.int64)]
