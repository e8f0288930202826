"""Metrics of copying: the gain by documents on unseen art codes, and when a run stops early."""

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.eval import likelihood
from rag_mm.stages.ra_cm3 import copy_metrics

ART = np.array([[True, True, False, False], [False, True, True, True]])


@pytest.fixture
def scored(monkeypatch):
    """Without documents no code is predicted; with one, the first document's codes are. Returns the calls."""
    calls = []

    def score_codes(generator, mains, docs):
        calls.append([len(documents) for documents in docs])
        is_top1 = np.zeros(ART.shape, bool)
        is_top1[0] = len(docs[0]) > 0
        return likelihood.CodeScores(np.where(is_top1, 0.5, 2.0), is_top1)

    monkeypatch.setattr(likelihood, "score_codes", score_codes)
    return calls


def make_watch(min_gain=0.0, docs=((("doc",)), ("doc",))):
    return copy_metrics.CopyWatch(["a", "b"], docs, ART, num_steps=10, min_gain=min_gain)


def test_figures_are_means_over_documents_of_their_art_codes(scored):
    figures = make_watch()(1, None)
    assert scored == [[0, 0], [1, 1]]
    assert figures == {
        "art_nll_docs0": 2.0,
        "art_top1_docs0": 0.0,
        "art_nll_docs1": (0.5 + 2.0) / 2,
        "art_top1_docs1": 0.5,
    }


def test_the_baseline_is_scored_without_documents(scored):
    assert set(make_watch(docs=((), ()))(10, None)) == {"art_nll_docs0", "art_top1_docs0"}


def test_a_run_that_copies_too_little_stops_at_half_of_the_steps(scored):
    watch = make_watch(min_gain=0.6)
    watch(4, None)
    with pytest.raises(
        UserError, match="step 5 of 10: documents raise .* by 0.500, min_gain is 0.6"
    ):
        watch(5, None)
    make_watch(min_gain=0.5)(5, None)


def test_without_a_minimum_gain_no_run_stops(scored, monkeypatch):
    monkeypatch.setattr(
        likelihood,
        "score_codes",
        lambda *_: likelihood.CodeScores(np.zeros(ART.shape), np.zeros(ART.shape, bool)),
    )
    make_watch()(10, None)
