"""Range checks name the value, and pass exactly what they say."""

import types

import pytest

from rag_mm.core import checks


@pytest.mark.parametrize(
    ("check", "good", "bad", "says"),
    [
        (lambda c: checks.at_least(c, 1, "x"), [1, 5, None], [0, -1, float("nan")], "at least 1"),
        (lambda c: checks.above(c, 0, "x"), [0.1, None], [0, -1, float("nan")], "more than 0"),
        (lambda c: checks.between(c, 0, 1, "x"), [0, 0.5, 1], [-0.1, 1.1], "0 to 1"),
        (lambda c: checks.below_one(c, "x"), [0, 0.99], [1, -0.1], "less than 1"),
        (lambda c: checks.one_of(c, "x", ("a", "b")), ["a", "b"], ["c", None], "one of a, b"),
    ],
)
def test_what_is_outside_is_refused_by_name(check, good, bad, says):
    for value in good:
        check(types.SimpleNamespace(x=value))
    for value in bad:
        with pytest.raises(ValueError, match=f"x is .*{says}"):
            check(types.SimpleNamespace(x=value))
