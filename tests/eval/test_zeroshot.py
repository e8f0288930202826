"""Zero-shot classification and retrieval: prompts, ensembles, ties, several right answers."""

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.eval import zeroshot


def test_prompts_of_one_name_stand_together():
    made = zeroshot.prompts(["cat", "{} dog"], ["a {}.", "{}"])
    assert made == ["a cat.", "cat", "a {} dog.", "{} dog"]


@pytest.mark.parametrize(
    ("names", "templates", "says"),
    [([], ["{}"], "one class"), (["cat"], [], "one template"), (["cat"], ["a photo"], "has no {}")],
)
def test_prompts_that_name_nothing(names, templates, says):
    with pytest.raises(UserError, match=says):
        zeroshot.prompts(names, templates)


def test_an_ensemble_is_the_mean_rescaled():
    found = zeroshot.ensemble(np.array([[[1, 0], [0, 1]]], np.float32))
    np.testing.assert_allclose(found, [[np.sqrt(0.5)] * 2], atol=1e-6)


def test_hits_and_ties():
    classes = np.eye(3, dtype=np.float32)
    assert zeroshot.hits_at_1(classes, classes, np.array([0, 1, 0])).tolist() == [True, True, False]
    # All alike: nothing is found.
    alike = np.ones((3, 2), np.float32)
    assert not zeroshot.hits_at_1(alike, alike, np.arange(3)).any()


def test_recall_grows_with_k_and_any_right_answer_will_do():
    similarities = np.array([[0.9, 0.8, 0.7, 0.6]] * 3)
    at = zeroshot.recall_at_k(similarities, np.array([0, 1, 3]), at=(1, 2, 4))
    assert {k: hits.tolist() for k, hits in at.items()} == {
        1: [True, False, False],
        2: [True, True, False],
        4: [True, True, True],
    }
    several = np.array([[False, True, False, True]] * 3)
    assert zeroshot.ranks(similarities, several).tolist() == [1, 1, 1]


def test_the_harmonic_mean_wants_both():
    assert zeroshot.harmonic_mean(0.5, 0.5) == 0.5
    assert zeroshot.harmonic_mean(0.9, 0.1) == pytest.approx(0.18)
    assert zeroshot.harmonic_mean(0.9, 0.0) == 0.0
