"""Metrics carry confidence intervals; claims rest on paired differences."""

import math

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.eval import statistics


def test_an_accuracy_in_the_middle_has_the_usual_interval():
    figure = statistics.accuracy([True, False] * 200)
    assert figure["accuracy"] == 0.5 and figure["n"] == 400
    assert figure["ci95"] == pytest.approx(1.96 * math.sqrt(0.25 / 400), rel=0.01)


@pytest.mark.parametrize("hit", [True, False])
def test_an_accuracy_at_the_edge_is_not_certain(hit):
    figure = statistics.accuracy([hit] * 100)
    assert figure["accuracy"] == float(hit)
    assert 0.03 < figure["ci95"] < 0.04  # The "rule of three" says about 3 / n.


def test_accuracy_wants_hits_and_misses():
    with pytest.raises(ValueError, match=r"0 or 1, not 0\.5"):
        statistics.accuracy([0.0, 0.5])
    with pytest.raises(UserError, match="too few"):
        statistics.accuracy([])


def test_the_interval_of_an_accuracy_is_wilsons():
    """Against the closed form of Wilson (1927)."""
    z, share, n = 1.959964, 0.3, 10
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n * n))
    figure = statistics.accuracy([1] * 3 + [0] * 7)
    assert figure["ci95"] == pytest.approx(half + abs(center - share), rel=1e-6)


@pytest.mark.parametrize(("num_values", "quantile"), [(2, 12.706), (3, 4.303), (10, 2.262)])
def test_students_t(num_values, quantile):
    assert statistics.student_t95(num_values) == pytest.approx(quantile, abs=5e-4)


def test_mean_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    figures = [statistics.mean(rng.normal(3.0, 2.0, size=64)) for _ in range(500)]
    covered = [abs(f["mean"] - 3.0) <= f["ci95"] for f in figures]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_pairing_removes_what_documents_have_in_common():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0.0, 10.0, size=200)
    ours, theirs = difficulty + rng.normal(0.5, 0.1, 200), difficulty
    paired = statistics.paired_difference(ours, theirs)
    assert paired["mean"] == pytest.approx(0.5, abs=0.05)
    assert paired["standard_error"] == pytest.approx(0.1 / math.sqrt(200), rel=0.2)
    assert paired["ci95"] == pytest.approx(1.96 * paired["standard_error"], rel=1e-3)
    assert statistics.standard_error(ours) > 50 * paired["standard_error"]


def test_hits_can_be_paired():
    paired = statistics.paired_difference([True, True, False], [False, True, False])
    assert paired["mean"] == pytest.approx(1 / 3)


def test_nan_is_refused_by_name():
    with pytest.raises(UserError, match="art NLL: 1 of 3 values are NaN"):
        statistics.mean([1.0, float("nan"), 2.0], "art NLL")
    with pytest.raises(UserError, match="NaN or infinite"):
        statistics.paired_difference([1.0, 2.0], [1.0, float("inf")])


def test_one_document_has_no_spread_and_unequal_lists_no_pairs():
    with pytest.raises(UserError, match="1 documents are too few"):
        statistics.mean([1.0])
    with pytest.raises(ValueError, match="cannot be paired"):
        statistics.paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
