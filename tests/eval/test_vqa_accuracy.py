"""VQA accuracy: cleaning and consensus as the official evaluation does them.

Expected values follow visualqa.org/evaluation.html and github.com/GT-Vision-Lab/VQA at a013f00
(PythonEvaluationTools/vqaEvaluation/vqaEval.py), run on the same answers.
"""

import pytest

from rag_mm.eval import vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ("The Red.", "red"),
        ("a an the", ""),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'dve", "yall'dve"),
        ("y'all'dve", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("Im here", "im here"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("yes!", "yes"),
        ("red/blue", "red blue"),
        ("red/ blue", "red blue"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.a", "usa"),
        ("it's 5:30", "it's 5:30"),
    ],
)
def test_cleaning(answer, cleaned):
    assert vqa_accuracy.clean(answer) == cleaned


@pytest.mark.parametrize(
    ("equal", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_consensus_leaves_each_person_out_in_turn(equal, expected):
    """Three of ten: seven people see three others, min(3 / 3, 1), and three see two, 2 / 3."""
    people = ["red"] * equal + [f"other {i}" for i in range(10 - equal)]
    assert vqa_accuracy.accuracy("Red.", people) == (pytest.approx(expected) if equal < 10 else 0.0)
    assert vqa_accuracy.accuracy("red", people) == pytest.approx(expected)


def test_answers_are_cleaned_only_where_people_disagree():
    assert vqa_accuracy.accuracy("the bus", ["the bus"] * 10) == 1.0
    assert vqa_accuracy.accuracy("bus", ["the bus"] * 10) == 0.0
    assert vqa_accuracy.accuracy("bus", ["the bus"] * 9 + ["a car"]) == 1.0
    assert vqa_accuracy.accuracy(" two\n", ["2"] * 5 + ["two"] * 4 + ["three"]) == 1.0


def test_a_single_answer_has_no_others():
    assert vqa_accuracy.accuracy("red", ["red"]) == 0.0
    with pytest.raises(ValueError, match="people"):
        vqa_accuracy.accuracy("red", [])
