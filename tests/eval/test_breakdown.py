"""Variants are compared document by document, and group by group."""

import numpy as np
import pytest

from rag_mm.eval import breakdown

PAIRS = [("nll", "ours", "theirs"), ("joint", "ours", "absent"), ("cider", "ours", "theirs")]
VALUES = {
    "ours": {"nll": np.array([1.0, 2.0, 3.0, 9.0]), "joint": np.array([1.0, 0.0, 1.0, 1.0])},
    "theirs": {"nll": np.array([2.0, 4.0, 3.0, 1.0]), "joint": np.zeros(4)},
}


def test_only_what_both_sides_have_is_paired():
    found = breakdown.paired(VALUES, PAIRS)
    assert list(found) == ["nll_ours_minus_theirs"]
    assert found["nll_ours_minus_theirs"]["mean"] == pytest.approx(1.25)


def test_groups_hold_their_own_documents_and_one_document_is_no_group():
    found = breakdown.by_group(VALUES, ["easy", "easy", "free", "lonely"], PAIRS)
    assert list(found) == ["easy"]
    easy = found["easy"]
    assert easy["n"] == 2 and easy["nll"]["ours"]["mean"] == 1.5
    assert easy["joint_accuracy"]["ours"]["accuracy"] == 0.5
    assert easy["joint_accuracy"]["theirs"] == easy["joint_accuracy"]["ours"] | {
        "accuracy": 0.0,
        "ci95": easy["joint_accuracy"]["theirs"]["ci95"],
    }
    assert easy["paired"]["nll_ours_minus_theirs"]["mean"] == -1.5
