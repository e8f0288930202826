"""Figures are looked up in nested metrics and formatted with their interval; missing ones stay missing."""

import pytest

from rag_mm.report import figures

METRICS = {
    "decoder": {
        "joint_accuracy": {"docs2": {"accuracy": 0.621, "ci95": 0.059, "n": 256}},
        "art_nll": {"docs0": {"mean": 5.41, "ci95": 0.123, "n": 256}},
        "stopped": True,
        "loss": float("nan"),
    },
    "memory": {"rows": 27392},
}


def test_figures_are_found_by_path():
    assert figures.find(METRICS, "memory.rows") == figures.Figure(27392.0)
    figure = figures.find(METRICS, "decoder.joint_accuracy.docs2")
    assert figure == figures.Figure(0.621, 0.059, 256)
    assert figure.standard_error == pytest.approx(0.0301, abs=1e-4)


@pytest.mark.parametrize(
    "path", ["nothing", "memory.rows.deeper", "decoder.joint_accuracy", "decoder.stopped",
             "decoder.loss"],
)  # fmt: skip
def test_what_is_not_a_finite_number_is_missing(path):
    assert figures.find(METRICS, path) is None


def test_figures_are_written_with_their_interval():
    assert figures.percent(figures.Figure(0.621, 0.059, 256)) == "62.1 % ± 5.9"
    assert figures.percent(figures.Figure(0.95)) == "95.0 %"
    assert figures.number(figures.Figure(5.41, 0.123), unit="nats") == "5.41 ± 0.12 nats"
    assert figures.percent(None) == figures.number(None) == "not measured"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.4, "59 s"),
        (60, "1 min 00 s"),
        (1180, "19 min 40 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_formatted(seconds, text):
    assert figures.duration(seconds) == text


def test_flatten_keeps_every_figure():
    assert dict(figures.flatten(METRICS)) == {
        "decoder.art_nll.docs0": "5.41 ± 0.123 (n = 256)",
        "decoder.joint_accuracy.docs2": "0.621 ± 0.059 (n = 256)",
        "decoder.loss": "nan",
        "decoder.stopped": "True",
        "memory.rows": "27392",
    }
