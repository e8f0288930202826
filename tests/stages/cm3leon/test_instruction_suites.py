"""Suites and measurements that have nothing to ask, or no way to ask it, are refused in one sentence."""

import types

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.decode.sampler import Sampling
from rag_mm.stages.cm3leon import instruction_suites, measure_tasks, scene_instructions
from rag_mm.worlds.emoji import class_splits, emoji_scenes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(temperature=float("inf")), "temperature is inf; give a finite number"),
        (dict(temperature=float("nan")), "temperature is nan; give a finite number"),
        (dict(temperature=-1.0), "temperature is -1.0; give a finite number of at least 0"),
        (dict(limit=1), "limit is 1"),
        (dict(docs=-1), "docs is -1"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        instruction_suites.SuiteConfig(**fields)


def test_scenes_about_which_a_suite_asks_nothing(monkeypatch):
    scenes = emoji_scenes.Scenes("easy", class_splits.classes("common")[:1], "test")
    assert list(instruction_suites._items(scenes, "vqa", 32))
    # Two objects are counted, and these scenes have one.
    monkeypatch.setitem(instruction_suites.SUITES, "vqa", ("question", "how_many"))
    with pytest.raises(UserError, match="The suite vqa has no question about these scenes"):
        list(instruction_suites._items(scenes, "vqa", 32))


@pytest.mark.parametrize(
    ("task", "fields", "says"),
    [
        (
            "draw_boxes",
            dict(name="apple", box="8 0 to 32 24", color="red"),
            "apple on a red background",
        ),
        (
            "boxes",
            dict(caption="a kitchen", boxes="bottle at 1 2 to 3 4 and dining table at 0 0 to 9 9"),
            "a kitchen bottle and dining table",
        ),
        ("structure", dict(caption="a house", feature="canny"), "a house"),
    ],
)
def test_documents_of_a_drawing_are_found_by_its_words(task, fields, says):
    picture = np.zeros((8, 8, 3), np.uint8)
    item = InstructionItem("1", task, fields, picture)
    assert instruction_suites.reads_documents(item)
    assert instruction_suites.query(item) == says
    assert not instruction_suites.reads_documents(
        InstructionItem("2", "edit", {"edit": "x"}, picture)
    )


def test_a_task_without_items_among_the_test_scenes():
    scenes = types.SimpleNamespace(items=lambda task: ([], []), num_test=3)
    scorer = measure_tasks.TaskScorer(scenes, lambda: None, Sampling(1.0), seed=0)
    with pytest.raises(UserError, match="None of the 3 test scenes has an item of the task swap"):
        scorer.ask(scene_instructions.find("swap"))
