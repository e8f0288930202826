"""Range checks of configs: a wrong value is refused by name before anything runs."""

from collections.abc import Mapping
from typing import Any

from rag_mm.core.errors import UserError

MAX_SIZE = 1 << 24
"""No size that a model is made of is larger: widths, layers, positions, ids of a vocabulary."""
MAX_LENGTH = 1 << 10
"""Nor has a list of sizes more entries."""
MAX_BLOCKS = 15
"""No convolutional network here has more scales, or more residual blocks at one of them."""


def at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError where an attribute is below `least`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}; give at least {least}")


def above(config: Any, bound: float, *names: str) -> None:
    """Raises ValueError where an attribute is not above `bound`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > bound:
            raise ValueError(f"{name} is {value}; give more than {bound}")


def below_one(config: Any, *names: str) -> None:
    """Raises ValueError where an attribute is not in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; give at least 0 and less than 1")


def between(config: Any, low: float, high: float, *names: str) -> None:
    """Raises ValueError where an attribute is outside [low, high]; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}; give {low} to {high}")


def one_of(config: Any, name: str, known: Any) -> None:
    """Raises ValueError where an attribute is none of `known`."""
    value = getattr(config, name)
    if value not in known:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(map(str, known))}")


def sizes(values: Any, where: str) -> None:
    """Refuses what would make a model endless, in plain values that somebody else wrote.

    Raises:
        UserError: an integer, anywhere inside `values`, is beyond `MAX_SIZE`, or a list has more than
            `MAX_LENGTH` entries; `where` is named.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            sizes(value, f"{where}: {key}")
    elif isinstance(values, list | tuple):
        if len(values) > MAX_LENGTH:
            raise UserError(
                f"{where} has {len(values):,} entries; at most {MAX_LENGTH:,} are read."
            )
        for value in values:
            sizes(value, where)
    elif isinstance(values, int) and abs(values) > MAX_SIZE:
        raise UserError(f"{where} is {str(values)[:20]}; at most {MAX_SIZE:,} is possible.")
