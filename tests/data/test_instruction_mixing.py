"""Mixing: no dataset is repeated more than 3 times or cut below 0.3, by hand-computed numbers."""

import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import instruction_mixing

SIZES = {"small": 100, "middle": 1000, "large": 9900, "largest": 29000}  # mean 10,000


def test_capped_mixing_by_hand():
    times = instruction_mixing.repeats(SIZES)
    assert times == {
        "small": 3.0,
        "middle": 3.0,
        "large": pytest.approx(1 / 0.99),
        "largest": 10 / 29,
    }
    shares = instruction_mixing.shares(SIZES)
    total = 300 + 3000 + 10000 + 10000
    assert shares == pytest.approx(
        {
            "small": 300 / total,
            "middle": 3000 / total,
            "large": 10000 / total,
            "largest": 10000 / total,
        }
    )
    far = instruction_mixing.repeats({"a": 10, "b": 10, "c": 1000})  # mean 340
    assert far == {"a": 3.0, "b": 3.0, "c": pytest.approx(0.34)}
    assert instruction_mixing.repeats({"a": 1, "b": 1, "c": 1, "d": 997})["d"] == 0.3


def test_thresholds_and_the_alternative():
    assert instruction_mixing.repeats(SIZES, "proportional") == dict.fromkeys(SIZES, 1.0)
    assert instruction_mixing.shares(SIZES, "proportional")["large"] == 9900 / 40000
    times = instruction_mixing.repeats(SIZES, most=200, least=0.01)
    assert times["small"] == 100 and times["largest"] == 10000 / 29000  # all as often
    assert set(instruction_mixing.repeats(SIZES, most=1, least=1).values()) == {1.0}


def test_equal_sizes_are_left_alone():
    assert instruction_mixing.shares({"a": 7, "b": 7}) == {"a": 0.5, "b": 0.5}


def test_a_share_is_raised_and_the_others_shrink_alike():
    given = {"draw": 0.1, "edit": 0.6, "ask": 0.3}
    raised = instruction_mixing.with_at_least(given, "draw", 0.2)
    assert raised == pytest.approx({"draw": 0.2, "edit": 0.6 * 8 / 9, "ask": 0.3 * 8 / 9})
    assert instruction_mixing.with_at_least(given, "edit", 0.2) == given
    assert instruction_mixing.with_at_least({"draw": 1.0}, "draw", 0.2) == {"draw": 1.0}
    for share, name in ((1.0, "draw"), (0.2, "none")):
        with pytest.raises(ValueError, match="cannot get"):
            instruction_mixing.with_at_least(given, name, share)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({}, {}),
        ({"a": 0}, {}),
        ({"a": 1}, {"mixing": "x"}),
        ({"a": 1}, {"most": 0.5}),
        ({"a": 1}, {"least": 0}),
    ],
)
def test_nonsense_is_refused(sizes, changes):
    with pytest.raises(UserError, match="give"):
        instruction_mixing.repeats(sizes, **changes)
