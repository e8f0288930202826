"""Questions about scenes and which answers count."""

from collections import Counter

import numpy as np
import pytest

from rag_mm.worlds.emoji import art, class_splits, emoji_scenes, scene_questions, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import LEVELS, Scenes

QUESTIONS = (
    scene_questions.WHAT,
    scene_questions.WHERE,
    scene_questions.WHICH_COLOR,
    scene_questions.HOW_MANY,
)


def items_of(task, level):
    items = scene_tasks.TaskItems(task, Scenes(level, class_splits.classes("tune")[:16], "train"))
    return [items[i] for i in range(len(items))]


def answered(item, text):
    return scene_questions.judge_answer(item, text)["right"]


def test_all_names_of_a_class_are_accepted_and_no_others():
    for item in items_of(scene_questions.WHAT, "easy"):
        (entity,) = item.source.entities
        names = art.load_art().names
        assert all(answered(item, f"A {name.title()}.") for name in names[entity.class_id])
        assert not answered(item, names[(entity.class_id + 1) % len(names)][0])
        assert not answered(item, "")


@pytest.mark.parametrize("level", ["pairs", "free"])
def test_a_question_about_a_pair_has_one_answer(level):
    names = art.load_art().names
    for item in items_of(scene_questions.WHAT, level):
        asked = item.prompt[1].text.removeprefix("what is at the ").removesuffix("?")
        there = [
            e for e in item.source.entities if emoji_scenes.place(e, item.level) == asked
        ]  # Never two: they would overlap.
        assert [names[e.class_id] for e in there] == [item.answers]
    for item in items_of(scene_questions.WHERE, level):
        name = item.prompt[1].text.removeprefix("where is the ").removesuffix("?")
        named = [e for e in item.source.entities if name in names[e.class_id]]
        assert [(emoji_scenes.place(e, item.level),) for e in named] == [item.answers]


def test_closed_questions_list_every_answer():
    for level in LEVELS:
        where = items_of(scene_questions.WHERE, level)
        assert {item.answers[0] for item in where} == set(where[0].choices)
        assert len(where[0].choices) == (4 if level == "easy" else 9)
        color = items_of(scene_questions.WHICH_COLOR, level)
        assert {item.answers[0] for item in color} == set(color[0].choices)
        if level != "easy":
            counts = Counter(item.answers for item in items_of(scene_questions.HOW_MANY, level))
            assert set(counts) == {("one", "1"), ("two", "2")}
            assert min(counts.values()) > sum(counts.values()) / 3


@pytest.mark.parametrize("task", QUESTIONS[1:], ids=lambda task: task.name)
def test_only_one_choice_is_right(task):
    for item in items_of(task, "sizes")[::10]:
        right = [choice for choice in item.choices if answered(item, choice)]
        assert right == [item.answers[0]] == [item.target[0].text]


def test_the_color_is_that_of_the_picture():
    for item in items_of(scene_questions.WHICH_COLOR, "easy")[::10]:
        corners = item.prompt[0].pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == np.array(emoji_scenes.COLORS[item.answers[0]])).all(-1).any()
