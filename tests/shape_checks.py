"""The type checker behind the shape checks of tests: beartype, accepting an int for a float as mypy does."""

from collections.abc import Callable

import beartype

_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """`function` with its arguments and result checked.

    Constructors are not checked: those of configs also accept what a JSON file holds, such as lists for
    tuples, and convert it.
    """
    return function if function.__name__ == "__init__" else _check(function)
