"""Questions about a scene: what is where, which color, how many. An item gives an image, then a question."""

import numpy as np

from rag_mm.core.document_types import Segment, Text
from rag_mm.worlds.emoji import art, emoji_scenes, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts, Level, Scenes
from rag_mm.worlds.emoji.scene_tasks import SceneTask, Scores, TaskItem

_COUNTS = {"one": "1", "two": "2"}


def judge_answer(item: TaskItem, text: str) -> Scores:
    """`right`: the text is one of the accepted answers, see `scene_tasks.normalize`."""
    accepted = {scene_tasks.normalize(answer) for answer in item.answers}
    return {"right": scene_tasks.normalize(text) in accepted}


def places(level: Level) -> tuple[str, ...]:
    """The places at which entities of a level can be, in words."""
    boxes = [(size, *corner) for size in level.sizes for corner in level.corners(size)]
    return tuple(dict.fromkeys(emoji_scenes.place(Entity(0, *box), level) for box in boxes))


def _ask_what(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    entity = facts.entities[rng.integers(len(facts.entities))]
    question = f"what is at the {emoji_scenes.place(entity, level)}?"
    return _item(facts, level, question, art.load_art().names[entity.class_id])


def _ask_where(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    entity = facts.entities[rng.integers(len(facts.entities))]
    question = f"where is the {scene_tasks.any_name(entity, rng)}?"
    return _item(facts, level, question, (emoji_scenes.place(entity, level),), places(level))


def _ask_color(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    question = "which color is the background?"
    return _item(facts, level, question, (facts.color,), tuple(emoji_scenes.COLORS))


def _ask_how_many(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    word = list(_COUNTS)[len(facts.entities) - 1]
    return _item(facts, level, "how many things are there?", (word, _COUNTS[word]), tuple(_COUNTS))


def _item(
    facts: Facts,
    level: Level,
    question: str,
    answers: tuple[str, ...],
    choices: tuple[str, ...] = (),
) -> TaskItem:
    prompt: tuple[Segment, ...] = (scene_tasks.picture(facts, level), Text(question))
    return TaskItem(level, facts, prompt, (Text(answers[0]),), (facts,), answers, choices)


_SCORE = scene_tasks.score_texts(judge_answer)
WHAT = SceneTask("what", _ask_what, _SCORE)
WHERE = SceneTask("where", _ask_where, _SCORE)
WHICH_COLOR = SceneTask("which_color", _ask_color, _SCORE)
HOW_MANY = SceneTask("how_many", _ask_how_many, _SCORE, lambda level: level.max_entities == 2)
