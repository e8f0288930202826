"""Scene tasks as instructions: every task's words fill its templates and fit a short text."""

import numpy as np
import pytest

from rag_mm.core.document_types import Text
from rag_mm.core.errors import UserError
from rag_mm.data import instruction_items, instruction_templates
from rag_mm.stages.cm3leon import scene_instructions
from rag_mm.worlds.emoji import class_splits, emoji_scenes, scene_captions

CLASSES = class_splits.classes("common")[:4]
EASY = emoji_scenes.Scenes("easy", CLASSES, "train")
PAIRS = emoji_scenes.Scenes("pairs", CLASSES, "train")


@pytest.mark.parametrize("name", scene_instructions.TASKS)
@pytest.mark.parametrize("scenes", [EASY, PAIRS], ids=["easy", "pairs"])
def test_every_task_has_words_for_its_templates(name, scenes):
    task = scene_instructions.find(name)
    if name == "how_many" and scenes is EASY:
        with pytest.raises(UserError, match="no items"):
            scene_instructions.SceneInstructions(task, scenes)
        return
    items = scene_instructions.SceneInstructions(task, scenes)
    for number in range(0, len(items), 5):
        made = items[number]
        assert made.item.task == name and len(made.item.given) == task.num_given
        assert made.item.wants_text == task.wants_text
        for template in instruction_templates.TEMPLATES[name]:
            assert len(template.given) == task.num_given
            text = instruction_items.fill(template.text, made.item.fields)
            assert "{" not in text and text == text.strip()
        if task.wants_text:
            assert np.array_equal(made.item.picture, scenes.image(made.scene))


def test_an_item_says_what_its_scene_task_says():
    def first(name):
        return scene_instructions.SceneInstructions(scene_instructions.find(name), EASY)[0]

    facts = EASY.facts(0)
    place = emoji_scenes.place(facts.entities[0], EASY.levels[0])
    move, boxes, where = first("move"), first("draw_boxes"), first("where")
    assert move.item.fields["place"] != place
    assert np.array_equal(move.item.given[0], EASY.image(0))
    top, left = facts.entities[0].row, facts.entities[0].column
    assert boxes.item.fields["box"] == f"{left} {top} to {left + 24} {top + 24}"
    assert boxes.item.fields["color"] == facts.color
    assert where.item.fields["answer"] == place
    swap = first("swap").item
    assert len(swap.given) == 2 and not np.array_equal(*swap.given)
    assert first("text_to_image").item.fields == {"caption": EASY.full_caption(0)}


@pytest.mark.parametrize("name", scene_instructions.TASKS)
def test_the_target_itself_is_right(name):
    """By the figure that stands for the task."""
    task = scene_instructions.find(name)
    scenes = PAIRS if name == "how_many" else EASY
    items = [scene_instructions.SceneInstructions(task, scenes)[i].task_item for i in range(3)]
    scores = task.scene_task.score(items, [item.target for item in items])
    assert all(each[task.figure] for each in scores)


def test_a_caption_is_judged_in_parts():
    task = scene_instructions.find("caption")
    item = scene_instructions.SceneInstructions(task, EASY)[0].task_item
    color = EASY.facts(0).color
    other = "red" if color != "red" else "blue"

    def judge(text):
        return scene_captions.judge_caption(item, text)

    whole = EASY.full_caption(0)
    assert judge(f" {whole.upper()}. ") == dict.fromkeys(
        ("right", "entity", "place", "color"), True
    )
    assert judge(whole.replace(f"{color} background", f"{other} background")) == {
        "right": False,
        "entity": True,
        "place": True,
        "color": False,
    }
    assert not any(judge("").values())


def test_answers_are_judged_by_their_text():
    task = scene_instructions.find("which_color")
    item = scene_instructions.SceneInstructions(task, EASY)[0].task_item
    right, wrong = task.scene_task.score([item] * 2, [(Text(EASY.facts(0).color),), (Text("?"),)])
    assert right["right"] and not wrong["right"]


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="no task 'paint'; choose from recolor"):
        scene_instructions.find("paint")
