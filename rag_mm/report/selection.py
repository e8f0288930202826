"""Which test documents a report shows: by a rule on their order, before anything is known of the outcome."""

import numpy as np


def first_of_each_class(class_ids: np.ndarray) -> np.ndarray:
    """Places of the first document of each class, int64, in the documents' order.

    Args:
        class_ids: int [Q], what each document shows.
    """
    return np.sort(np.unique(class_ids, return_index=True)[1])


def choose(
    class_ids: np.ndarray, is_flag: np.ndarray, num_flags: int, num_others: int
) -> np.ndarray:
    """Places of one document a class: so many flags and others, spread evenly from first to last.

    Evenly, because classes stand in the order of their names: the first few are all signs and buttons.

    Args:
        class_ids: int [Q], what each document shows.
        is_flag: bool [Q].
        num_flags: flags to show, fewer if there are no more.
        num_others: others to show, likewise.

    Returns:
        int64 places, in the documents' order.
    """
    first = first_of_each_class(class_ids)
    flags, others = first[is_flag[first]], first[~is_flag[first]]
    return np.sort(np.concatenate([_spread(flags, num_flags), _spread(others, num_others)]))


def rule(num_flags: int, num_others: int) -> str:
    """The sentence that states the rule of `choose`, for what it found."""
    counts = [
        f"{count} {name}{'s' * (count > 1)}"
        for count, name in ((num_flags, "flag"), (num_others, "other"))
        if count
    ]
    return (
        f"Chosen by a rule, never by outcome: of the held-out classes in their order "
        f"{' and '.join(counts)}, evenly spread from first to last, each with its first test document."
    )


def _spread(places: np.ndarray, count: int) -> np.ndarray:
    count = min(count, len(places))
    return places[np.linspace(0, len(places) - 1, count).round().astype(np.int64)]
