"""FLOPs of any function's matrix products and convolutions, counted in its trace; nothing is compiled or run.

Scanned layers count as often as they run, which the compiler's count misses.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def count(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of one call with arguments of these shapes; a multiply-add counts as two.

    Of a branch the most expensive side counts, and a `while` loop's body once, since how often it runs is not
    known.

    Args:
        function: one that jax can trace.
        args: arrays, or `jax.ShapeDtypeStruct` in place of them.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            each = math.prod(sizes[axis] for axis in contracted)
            total += 2 * equation.outvars[0].aval.size * each
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size // outputs
        else:
            inner = [_count(each) for each in _inner(params)]
            if name == "cond":
                total += max(inner, default=0)
            else:
                total += params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The functions that an equation calls."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each
