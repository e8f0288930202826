"""How often each task is drawn: capped or proportional mixing of datasets (CM3Leon, section 4).

The paper balances its tasks by up- and down-sampling "with a threshold of 3 / 0.3". Here all datasets are
brought to their mean size, but none is repeated more than 3 times, and none is cut below 0.3 of itself.
"""

from collections.abc import Mapping

from rag_mm.core.errors import UserError

CAPPED, PROPORTIONAL = "capped", "proportional"
MIXINGS = (CAPPED, PROPORTIONAL)
MOST, LEAST = 3.0, 0.3


def repeats(
    sizes: Mapping[str, int], mixing: str = CAPPED, most: float = MOST, least: float = LEAST
) -> dict[str, float]:
    """How many times each dataset is read in an epoch of the mixture.

    Args:
        sizes: examples of each dataset, each at least 1.
        mixing: capped: mean size / size, from `least` to `most`; proportional: all once.
        most, least: the thresholds, `least` at most 1 and `most` at least 1.

    Raises:
        UserError: there is no dataset, one is empty, or a threshold is on the wrong side of 1.
    """
    if not sizes or min(sizes.values()) < 1:
        raise UserError(f"The sizes to mix are {dict(sizes)}; give at least one, each 1 or more.")
    if mixing not in MIXINGS:
        raise UserError(f"mixing is {mixing!r}; give one of {', '.join(MIXINGS)}.")
    if not 0 < least <= 1 <= most:
        raise UserError(f"The thresholds are {most:g} / {least:g}; give at least 1, and 0 to 1.")
    if mixing == PROPORTIONAL:
        return dict.fromkeys(sizes, 1.0)
    mean = sum(sizes.values()) / len(sizes)
    return {name: min(most, max(least, mean / size)) for name, size in sizes.items()}


def shares(
    sizes: Mapping[str, int], mixing: str = CAPPED, most: float = MOST, least: float = LEAST
) -> dict[str, float]:
    """The share of each dataset among the examples, in sum 1; arguments and errors as for `repeats`."""
    times = repeats(sizes, mixing, most, least)
    counts = {name: times[name] * size for name, size in sizes.items()}
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def with_at_least(given: Mapping[str, float], name: str, share: float) -> dict[str, float]:
    """The shares with that of `name` raised to `share` where it is lower; all others shrink alike.

    Raises:
        ValueError: there is no such share, or `share` is not in [0, 1).
    """
    if name not in given or not 0 <= share < 1:
        raise ValueError(f"{name} cannot get {share} of {dict(given)}")
    if given[name] >= share:
        return dict(given)
    factor = (1 - share) / (1 - given[name])
    return {other: share if other == name else factor * own for other, own in given.items()}
