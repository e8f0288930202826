"""Range checks of configs: a wrong value is refused by name before anything runs."""

from typing import Any


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
