"""CIDEr: shared rare words count, common ones do not, and nothing is undefined."""

import fresh_python
import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.eval import cider

TRUTH = [
    ["rocket at the top left on a red background"],
    ["penguin at the top right on a blue background"],
    ["flag: Côte d’Ivoire at the bottom on a white background"],
]


def test_words_are_lower_case_without_punctuation():
    assert cider.words("Flag: Côte d’Ivoire, at the TOP-left!") == [
        "flag", "côte", "d’ivoire", "at", "the", "top", "left",
    ]  # fmt: skip


def test_the_truth_scores_highest_and_the_wrong_entity_lower():
    perfect = cider.cider([captions[0] for captions in TRUTH], TRUTH)
    wrong = cider.cider(
        [
            "penguin at the top left on a red background",
            "rocket at the top right on a blue background",
            "flag: Norway at the bottom on a white background",
        ],
        TRUTH,
    )
    assert np.all(perfect > wrong) and np.all(wrong > 0)
    assert np.allclose(perfect, 10.0)


def test_scores_are_per_document_and_independent_of_other_candidates():
    first = cider.cider(["rocket", "penguin", "flag"], TRUTH)
    second = cider.cider(["rocket", "", "a red background"], TRUTH)
    assert first.shape == (3,) and first.dtype == np.float64
    assert first[0] == second[0]


def test_an_empty_candidate_scores_zero():
    assert cider.cider(["", "...", "nothing alike"], TRUTH).tolist() == [0.0, 0.0, 0.0]


def test_only_the_tokens_matter_not_case_or_punctuation():
    upper = [captions[0].upper() + "." for captions in TRUTH]
    plain = [captions[0] for captions in TRUTH]
    assert np.array_equal(cider.cider(upper, TRUTH), cider.cider(plain, TRUTH))


def test_undefined_cases_are_refused():
    with pytest.raises(UserError, match="at least 2"):
        cider.cider(["rocket"], [["rocket"]])
    with pytest.raises(ValueError, match="no words"):
        cider.cider(["rocket", "x"], [["rocket"], ["?!"]])
    with pytest.raises(ValueError, match="2 captions for 3"):
        cider.cider(["a", "b"], TRUTH)


def test_importing_it_is_quiet_and_light():
    loaded = fresh_python.modules_loaded_by("rag_mm.eval.cider")
    assert not loaded & {"matplotlib", "pycocotools", "scipy", "tensorflow", "torch", "jax"}


def test_a_thing_is_named_by_any_of_its_names_and_by_whole_words():
    captions = ["A Red-Apple, on blue", "pineapple", "cat and an apple", "cat"]
    wanted = [
        [["red apple", "apple"]],
        [["apple"]],
        [["apple"], ["cat", "kitty"]],
        [["cat"], ["dog"]],
    ]
    np.testing.assert_array_equal(cider.are_named(captions, wanted), [True, False, True, False])
