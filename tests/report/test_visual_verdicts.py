"""Claims about a visual decoder: each figure can break its own, and none is judged without figures."""

import copy

import pytest

from rag_mm.report import visual_verdicts


def _share(value):
    return {"accuracy": value, "ci95": 0.02, "n": 192}


def _mean(value):
    return {"mean": value, "ci95": 0.004, "n": 192}


def _paired(mean, error=0.001):
    return {"mean": mean, "standard_error": error, "ci95": 1.96 * error, "n": 192}


GOOD = {
    "held_out": {
        "place": {"none": _share(1.0), "null": _share(0.3), "control_none": _share(0.9)},
        "color": {"none": _share(0.96), "null": _share(0.14)},
        "mse": {"none": _mean(0.08), "control_none": _mean(0.09), "guidance_1": _mean(0.09)},
        "paired": {
            "mse_none_minus_control_none": _paired(-0.01),
            "mse_guidance_2_minus_guidance_1": _paired(-0.006),
            "mse_retrieved_minus_none": _paired(-0.009),
            "mse_oracle_minus_none": _paired(-0.01),
        },
    }
}


def _statuses(found):
    return [claim.status for claim in visual_verdicts.claims(found)]


def test_all_hold_for_good_figures_and_none_is_judged_without():
    assert _statuses(GOOD) == ["yes"] * 5
    assert _statuses({}) == ["unknown"] * 5


@pytest.mark.parametrize(
    ("claim", "path", "value"),
    [
        (0, ("place", "none"), _share(0.94)),
        (0, ("color", "none"), _share(0.94)),
        (1, ("place", "null"), _share(0.38)),
        (1, ("color", "null"), _share(0.25)),
        (2, ("paired", "mse_none_minus_control_none"), _paired(-0.004)),
        (2, ("paired", "mse_none_minus_control_none"), _paired(-0.01, 0.006)),
        (2, ("place", "control_none"), _share(1.01)),
        (3, ("paired", "mse_guidance_2_minus_guidance_1"), _paired(-0.006, 0.004)),
        (3, ("paired", "mse_guidance_2_minus_guidance_1"), _paired(0.006)),
        (4, ("paired", "mse_retrieved_minus_none"), _paired(-0.006)),
        (4, ("paired", "mse_retrieved_minus_none"), _paired(-0.009, 0.005)),
    ],
)
def test_each_figure_can_break_its_claim(claim, path, value):
    found = copy.deepcopy(GOOD)
    figure, variant = path
    found["held_out"][figure][variant] = value
    statuses = _statuses(found)
    assert statuses[claim] == "no" and statuses.count("yes") == 4


def test_a_gain_is_relative_to_the_other_error():
    gain = visual_verdicts.relative_gain(GOOD["held_out"], "none", "control_none")
    assert gain.value == pytest.approx(1 / 9) and gain.n == 192
    assert gain.standard_error == pytest.approx(0.001 / 0.09, rel=1e-3)


def test_without_a_control_the_others_are_judged():
    found = copy.deepcopy(GOOD)
    del found["held_out"]["paired"]["mse_none_minus_control_none"]
    assert _statuses(found) == ["yes", "yes", "unknown", "yes", "yes"]
