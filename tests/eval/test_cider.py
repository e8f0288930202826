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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("红苹果，在桌子上。", list("红苹果在桌子上")),
        ("赤いリンゴが2個、テーブルの上", [*"赤いリンゴが", "2", *"個テーブルの上"]),
        ("แอปเปิ้ลสีแดง ๑๒", [*"แอปเ", "ปิ้", "ล", "สี", *"แดง", "๑", "๒"]),
        ("ផ្លែប៉ោម", ["ផ្", "លែ", "ប៉ោ", "ម"]),
        ("𠮷野家 iPhone 15用", ["𠮷", "野", "家", "iphone", "15", "用"]),
        ("빨간 사과 a_b", ["빨간", "사과", "a", "b"]),
        ("تفاحة حمراء", ["تفاحة", "حمراء"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("rock 'n' roll's 'end'", ["rock", "n", "roll's", "end"]),
        ("красное яблоко", ["красное", "яблоко"]),
    ],
)
def test_scripts_without_spaces_are_split_into_characters(text, words):
    """Of others, words stay whole."""
    assert cider.words(text) == words


def test_a_caption_without_spaces_may_be_right_in_part():
    truth = [["红苹果在桌子上"], ["一只企鹅站在冰上"], ["蓝色背景上的火箭"]]
    found = cider.cider(["青苹果在桌子上", "一只企鹅", "香蕉"], truth)
    assert found[0] > 1 and found[1] > 1 and found[2] == 0


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
