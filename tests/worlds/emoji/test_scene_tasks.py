"""What holds of every scene task: exact scorers, items that depend on their number alone, no leaks."""

import itertools

import numpy as np
import pytest

from rag_mm.core.document_types import Image, Text
from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import (
    art,
    class_splits,
    emoji_scenes,
    scene_edits,
    scene_questions,
    scene_tasks,
    task_table,
)
from rag_mm.worlds.emoji.emoji_scenes import LEVELS, Scenes

every_task = pytest.mark.parametrize("task", task_table.TASKS.values(), ids=list(task_table.TASKS))


def items_of(task, levels=tuple(LEVELS), split="tune", role="train", **options):
    return scene_tasks.TaskItems(task, Scenes(levels, class_splits.classes(split), role, **options))


def spread(source, count):
    return [source[i] for i in np.linspace(0, len(source) - 1, count).astype(int).tolist()]


def is_right(scores):
    return all(value == 1 for value in scores.values())


@every_task
def test_the_scorer_is_right_on_originals_of_every_level(task):
    items = spread(items_of(task), 100 if task.name != "draw_clip" else 25)
    levels = {item.level.name for item in items}
    assert levels == set(LEVELS) - ({"easy"} if task.name == "how_many" else set())
    scores = task.score(items, [item.target for item in items])
    assert scores and all(scores) and all(map(is_right, scores))


@pytest.mark.slow
@every_task
def test_the_scorer_is_right_on_a_thousand_originals(task):
    items = spread(items_of(task, split="common", seed=1), 1000)
    assert all(map(is_right, task.score(items, [item.target for item in items])))


@every_task
def test_the_target_of_another_item_is_wrong(task):
    items = spread(items_of(task, levels="pairs"), 60)
    pairs = [
        (one, two)
        for one, two in itertools.pairwise(items)
        if one.facts != two.facts
        and len(one.target) == len(two.target)
        and not (one.answers and set(one.answers) & set(two.answers))
    ]
    assert len(pairs) >= 10
    scores = task.score([one for one, _ in pairs], [two.target for _, two in pairs])
    assert not any(map(is_right, scores))


@every_task
def test_an_item_depends_on_its_scene_and_variant_alone(task):
    ids = class_splits.classes("test")[:6]
    few = scene_tasks.TaskItems(task, Scenes("sizes", ids, "test"), num_variants=3)
    again = scene_tasks.TaskItems(task, Scenes("sizes", ids, "test"))
    scenes = Scenes("sizes", ids, "test")
    assert len(few) == 3 * len(again) == 3 * len(scenes)
    for i in range(len(again)):
        assert few.document(i).id == again.document(i).id
        assert few[i].source == again[i].source == scenes.facts(i)
        for one, two in zip(few.document(i).segments, again.document(i).segments, strict=True):
            assert type(one) is type(two)
            if isinstance(one, Image):
                np.testing.assert_array_equal(one.pixels, two.pixels)
            else:
                assert one == two
    documents = [few.document(i) for i in range(len(few))]
    assert len({document.id for document in documents}) == len(few)


@pytest.mark.parametrize("name", ["recolor", "move", "swap", "draw_clip", "story", "what"])
def test_variants_of_a_scene_differ(name):
    scenes = Scenes("pairs", class_splits.classes("test")[:6], "test")
    items = scene_tasks.TaskItems(task_table.TASKS[name], scenes, num_variants=2)
    half = len(items) // 2
    told = [items.document(i).text for i in range(len(items))]
    assert sum(told[i] != told[half + i] for i in range(half)) > half // 8
    assert items[0].source == items[half].source


@every_task
@pytest.mark.parametrize("seed", [0, 1])
def test_items_show_classes_of_one_split_only(task, seed):
    split = class_splits.split_of(seed)
    scenes = Scenes(
        "pairs",
        class_splits.classes("common", "rare_seen", "test", seed=seed)[::25],
        "memory",
        seed=seed,
    )
    items = scene_tasks.TaskItems(task, scenes)
    for i in range(0, len(items), 7):
        shown = {e.class_id for facts in (items[i].source, *items[i].facts) for e in facts.entities}
        assert {split[class_id] for class_id in shown} == {split[scenes.class_ids[i]]}


@every_task
def test_a_document_is_the_prompt_then_the_target(task):
    items = items_of(task, levels="free")
    item, document = items[5], items.document(5)
    assert all(
        one is two
        or (isinstance(one, Text) and one == two)
        or (isinstance(one, Image) and np.array_equal(one.pixels, two.pixels))
        for one, two in zip(document.segments, item.prompt + item.target, strict=True)
    )
    assert document.license == emoji_scenes.LICENSE
    assert document.id.startswith(f"{task.name}-free-")


def test_a_source_of_items_ends_and_needs_items():
    scenes = Scenes("easy", class_splits.classes("test")[:2], "test")
    items = scene_tasks.TaskItems(scene_questions.WHAT, scenes)
    assert len(list(items)) == len(items) == 8
    with pytest.raises(IndexError):
        items[8]
    with pytest.raises(UserError, match="no items of the task 'how_many'"):
        scene_tasks.TaskItems(scene_questions.HOW_MANY, scenes)
    mixed = Scenes(("easy", "pairs"), class_splits.classes("test")[:2], "test")
    asked = scene_tasks.TaskItems(scene_questions.HOW_MANY, mixed)
    assert 0 < len(asked) < len(mixed)
    assert {asked[i].level.name for i in range(len(asked))} == {"pairs"}


def test_pictures_are_scored_only_if_as_many_come_as_are_wanted():
    item = items_of(scene_edits.RECOLOR, levels="easy")[0]
    with pytest.raises(ValueError, match="1 images are wanted, not 2"):
        scene_edits.RECOLOR.score([item], [item.target * 2])
    assert scene_edits.RECOLOR.score([], []) == []


def test_answers_are_compared_without_case_spaces_article_and_period():
    assert scene_tasks.normalize(" The  Red\nApple. ") == "red apple"
    assert scene_tasks.normalize("anatomical heart") == "anatomical heart"
    for class_id, names in enumerate(art.load_art().names):
        assert {scene_tasks.class_of_name(f"the {name.upper()}") for name in names} == {class_id}
    assert scene_tasks.class_of_name("nothing of the kind") == -1
