"""Suites and measurements that have nothing to ask, or no way to ask it, are refused in one sentence."""

import types

import pytest
from etils import epath

from rag_mm.core.errors import UserError
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


def test_a_task_without_items_among_the_test_scenes():
    scenes = types.SimpleNamespace(items=lambda task: ([], []), num_test=3)
    scorer = measure_tasks.TaskScorer(scenes, epath.Path("none"), Sampling(1.0), seed=0)
    with pytest.raises(UserError, match="None of the 3 test scenes has an item of the task swap"):
        scorer.ask(scene_instructions.find("swap"))
