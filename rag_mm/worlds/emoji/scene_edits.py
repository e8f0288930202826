"""Edits of a scene: recolor its background, move an entity, swap it for the entity of a second image.

An item gives the image to edit (and the second one), then the instruction. Each instruction has exactly one
result, which differs from the image.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np

from rag_mm.core.document_types import Text
from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import class_splits, emoji_scenes, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts, Level, Scenes
from rag_mm.worlds.emoji.scene_tasks import SceneTask, Scores, TaskItem


def recolored(facts: Facts, level: Level, rng: np.random.Generator) -> Facts:
    """The scene on another background, one on which all its entities are visible."""
    colors = [color for color in common_colors(facts, level) if color != facts.color]
    return dataclasses.replace(facts, color=colors[rng.integers(len(colors))])


def common_colors(facts: Facts, level: Level) -> list[str]:
    """The background colors on which all entities of a scene are visible."""
    visible = [emoji_scenes.visible_colors(level, entity.class_id) for entity in facts.entities]
    return [color for color in visible[0] if all(color in others for others in visible)]


def moved(facts: Facts, level: Level, rng: np.random.Generator) -> Facts:
    """The scene with one entity exactly at another place, clear of the other entity.

    `At` a place means a single offset, as in captions: those that are only near it are no results.
    """
    number = int(rng.integers(len(facts.entities)))
    entity = facts.entities[number]
    others = facts.entities[:number] + facts.entities[number + 1 :]
    free = [
        there
        for row, column in _exact_corners(level, entity.size)
        if emoji_scenes.place(there := dataclasses.replace(entity, row=row, column=column), level)
        != emoji_scenes.place(entity, level)
        and all(_is_apart(there, other) for other in others)
    ]
    return _replaced(facts, number, free[rng.integers(len(free))])


def changed_entity(before: Facts, after: Facts) -> int:
    """The number of the one entity that differs."""
    pairs = zip(before.entities, after.entities, strict=True)
    (number,) = (i for i, (old, new) in enumerate(pairs) if old != new)
    return number


def _exact_corners(level: Level, size: int) -> list[tuple[int, int]]:
    """The offsets at which a caption says `at`, one per place."""
    span = max(1, level.image_size - size)
    return [
        (row, column)
        for row, column in level.corners(size)
        if 2 * row % span == 2 * column % span == 0
    ]


def _is_apart(one: Entity, two: Entity) -> bool:
    down, right = two.row - one.row, two.column - one.column
    return not (-two.size < down < one.size and -two.size < right < one.size)


def _replaced(facts: Facts, number: int, entity: Entity) -> Facts:
    entities = (*facts.entities[:number], entity, *facts.entities[number + 1 :])
    return dataclasses.replace(facts, entities=entities)


def _make_recolor(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    after = recolored(facts, level, rng)
    return _item(facts, after, level, f"change the background to {after.color}")


def _make_move(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    after = moved(facts, level, rng)
    entity = after.entities[changed_entity(facts, after)]
    name, place = scene_tasks.any_name(entity, rng), emoji_scenes.place(entity, level)
    return _item(facts, after, level, f"move the {name} to the {place}")


def _make_swap(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    number = int(rng.integers(len(facts.entities)))
    entity = facts.entities[number]
    second = _find_second(scenes, index, rng)
    new = dataclasses.replace(entity, class_id=second.entities[0].class_id)
    name = scene_tasks.any_name(entity, rng)
    text = f"replace the {name} with the one in the second image"
    return _item(facts, _replaced(facts, number, new), level, text, second)


def _find_second(scenes: Scenes, index: int, rng: np.random.Generator) -> Facts:
    """A scene of the source with one entity, of another class of the same split, visible on this color.

    Raises:
        UserError: the source has none.
    """
    facts, level = scenes.facts(index), scenes.levels[index]
    split = class_splits.split_of(scenes.seed)
    shown = {entity.class_id for entity in facts.entities}
    for other in rng.permutation(len(scenes)).tolist():
        class_id = int(scenes.class_ids[other])
        if (
            scenes.levels[other] == level
            and split[class_id] == split[scenes.class_ids[index]]
            and class_id not in shown
            and facts.color in emoji_scenes.visible_colors(level, class_id)
        ):
            second = scenes.facts(other)
            if len(second.entities) == 1:
                return second
    raise UserError(
        f"{scenes} have no second image for {scenes.scene_id(index)}; take more classes of its split."
    )


def _item(
    before: Facts, after: Facts, level: Level, text: str, second: Facts | None = None
) -> TaskItem:
    images = [scene_tasks.picture(facts, level) for facts in (before, second) if facts]
    return TaskItem(
        level, before, (*images, Text(text)), (scene_tasks.picture(after, level),), (after,)
    )


def _placed(facts: Facts, level: Level) -> Counter[tuple[int, int, str]]:
    """What is compared of entities: class, size and place, without an order."""
    return Counter((e.class_id, e.size, emoji_scenes.place(e, level)) for e in facts.entities)


def judge_recolor(item: TaskItem, read: list[Facts]) -> Scores:
    """`compliance`: the color is the new one; `fidelity`: the entities are as they were."""
    (got,), (asked,) = read, item.facts
    return _verdict(
        got.color == asked.color, _placed(got, item.level) == _placed(asked, item.level)
    )


def judge_move(item: TaskItem, read: list[Facts]) -> Scores:
    """`compliance`: what was to move is at its new place; `fidelity`: all but its place is as it was."""
    (got,), (asked,) = read, item.facts
    level = item.level
    entity = asked.entities[changed_entity(item.source, asked)]
    there = (entity.class_id, emoji_scenes.place(entity, level))
    return _verdict(
        there in [(e.class_id, emoji_scenes.place(e, level)) for e in got.entities],
        got.color == asked.color
        and _of_entities(got, lambda e: (e.class_id, e.size))
        == _of_entities(asked, lambda e: (e.class_id, e.size))
        and _unchanged(item) <= _placed(got, level),
    )


def judge_swap(item: TaskItem, read: list[Facts]) -> Scores:
    """`compliance`: the classes are those asked for; `fidelity`: all but the class of one is as it was."""
    (got,), (asked,) = read, item.facts
    level = item.level
    return _verdict(
        _of_entities(got, lambda e: e.class_id) == _of_entities(asked, lambda e: e.class_id),
        got.color == asked.color
        and _of_entities(got, lambda e: (e.size, emoji_scenes.place(e, level)))
        == _of_entities(asked, lambda e: (e.size, emoji_scenes.place(e, level)))
        and _unchanged(item) <= _placed(got, level),
    )


def _unchanged(item: TaskItem) -> Counter[tuple[int, int, str]]:
    (asked,) = item.facts
    return _placed(asked, item.level) & _placed(item.source, item.level)


def _of_entities(facts: Facts, key: Callable[[Entity], object]) -> Counter[object]:
    return Counter(key(entity) for entity in facts.entities)


def _verdict(compliance: bool, fidelity: bool) -> Scores:
    """`joint`, both of them, means that the picture is the one asked for in class, size, place and color."""
    return {
        "compliance": compliance,
        "fidelity": fidelity,
        "joint": compliance and fidelity,
    }


RECOLOR = SceneTask("recolor", _make_recolor, scene_tasks.score_facts(judge_recolor))
MOVE = SceneTask("move", _make_move, scene_tasks.score_facts(judge_move))
SWAP = SceneTask("swap", _make_swap, scene_tasks.score_facts(judge_swap))
