"""The prompts, letter by letter, and how answers are read."""

import pytest

from rag_mm.frozen_lm import prompts
from rag_mm.frozen_lm.prompts import Answered, Continued


def test_classification():
    made = prompts.classification(
        [("sun red", "lion"), ("ice", "goblet")], ["ice sea"], ["lion", "goblet"], repeats=1
    )
    shown = "Input: sun red\nOutput: lion\nInput: ice\nOutput: goblet\n"
    assert made == (shown + shown, ["Input: ice sea\nOutput:"])


def test_task_induction_names_the_labels():
    made = prompts.classification([], ["ice"], ["lion", "two words"], induction=True)
    assert made.prefix == (
        "For each of the following input output pairs, output is one of ['lion' or 'two words']\n###\n"
    )


def test_captions_and_questions_stay_on_their_line():
    made = prompts.captioning([("sun red", "a\n red sun")], "ice")
    assert made.prefix == prompts.CAPTION + "Q: sun red\nA: a red sun\n"
    assert made.queries == ["Q: ice\nA:"]
    made = prompts.answering([Answered("sun", "which\ncolor?", "red")], "ice", "which color?")
    assert made.prefix == prompts.ANSWER + "C: sun\nQ: which color?\nA: red\n"
    assert made.queries == ["C: ice\nQ: which color?\nA:"]


def test_next_words_of_a_segment():
    example, query = Continued("a cat", "sun red", "ice sea"), Continued("a dog", "")
    made = prompts.next_words([example], query, 2)
    assert made.prefix.startswith("Learn a new language and predict 2 tokens")
    assert made.prefix.endswith("\nC: a cat\nQ: sun red\nA: ice sea\n")
    assert made.queries == ["C: a dog\nA:"]
    assert prompts.next_words([example], query, None).prefix.startswith(prompts.ALL_AT_ONCE)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (" cat\nInput:", 0),
        ("Cat  face, I think", 1),
        ("catalogue", 0),
        ("a cat", None),
        ("", None),
    ],
)
def test_the_longest_label_at_the_start_is_chosen(text, chosen):
    assert prompts.chosen_label(text, ["cat", "cat face", "dog"]) == chosen


def test_the_first_line_is_the_answer():
    assert prompts.first_line("\n a red sun \nQ: ice") == "a red sun"
    assert prompts.first_line(" \n") == ""
