"""Boxes in words: a caption with the box of each entity, to be drawn or to be told.

CM3Leon's spatially grounded generation writes boxes as `object at (x1,y1)->(x2,y2)`; here
`apple at 8 0 to 32 24 on a red background` gives left, top, right and bottom in pixels.
"""

import re

import numpy as np

from rag_mm.core.document_types import Text
from rag_mm.worlds.emoji import scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts, Level, Scenes
from rag_mm.worlds.emoji.scene_tasks import SceneTask, Scores, TaskItem

_BOX = re.compile(r"(.+?) at (\d+) (\d+) to (\d+) (\d+)(?: and |$)")
_NOTHING_RIGHT = dict.fromkeys(("entity", "place", "color", "box", "joint"), False)


def tell_boxes(facts: Facts, names: list[str]) -> str:
    """The caption with boxes; `names` are those of the entities in order."""
    boxes = [
        f"{name} at {e.column} {e.row} to {e.column + e.size} {e.row + e.size}"
        for name, e in zip(names, facts.entities, strict=True)
    ]
    return f"{' and '.join(boxes)} on a {facts.color} background"


def parse_boxes(text: str, level: Level) -> Facts | None:
    """What a caption with boxes says, or None if it is none or has a box that is no square in the image.

    An unknown name gives the class -1, an unknown color itself.
    """
    words = scene_tasks.normalize(text)
    told, separator, end = words.rpartition(" on a ")
    color, found = end.removesuffix(" background"), list(_BOX.finditer(told))
    if not separator or not end.endswith(" background"):
        return None
    if not found or "".join(match.group() for match in found) != told or told.endswith(" and "):
        return None
    entities = []
    for match in found:
        left, top, right, bottom = map(int, match.groups()[1:])
        size = right - left
        if size <= 0 or size != bottom - top or max(right, bottom) > level.image_size:
            return None
        entities.append(Entity(scene_tasks.class_of_name(match[1]), size, top, left))
    return Facts(tuple(entities), color)


def _make_draw(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    names = [scene_tasks.any_name(entity, rng) for entity in facts.entities]
    prompt = (Text("draw " + tell_boxes(facts, names)),)
    return TaskItem(level, facts, prompt, (scene_tasks.picture(facts, level),), (facts,))


def _make_tell(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    answer = tell_boxes(facts, [scene_tasks.first_name(entity) for entity in facts.entities])
    prompt = (scene_tasks.picture(facts, level), Text("describe it with boxes"))
    return TaskItem(level, facts, prompt, (Text(answer),), (facts,))


def judge_drawn(item: TaskItem, read: list[Facts]) -> Scores:
    """The keys of `scene_tasks.compare_boxes`."""
    return scene_tasks.compare_boxes(read[0], item.facts[0], item.level)


def judge_told(item: TaskItem, text: str) -> Scores:
    """The keys of `scene_tasks.compare_boxes`, in any order of the entities; all wrong if unreadable."""
    said = parse_boxes(text, item.level)
    return scene_tasks.compare_boxes(said, item.facts[0], item.level) if said else _NOTHING_RIGHT


DRAW_BOXES = SceneTask("draw_boxes", _make_draw, scene_tasks.score_facts(judge_drawn))
TELL_BOXES = SceneTask("tell_boxes", _make_tell, scene_tasks.score_texts(judge_told))
