"""Scenes to be described in words: an item gives an image and asks for the caption that states all facts."""

import re

import numpy as np

from rag_mm.core.document_types import Text
from rag_mm.worlds.emoji import art, emoji_scenes, scene_questions, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Scenes
from rag_mm.worlds.emoji.scene_tasks import SceneTask, Scores, TaskItem


def _make_caption(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    prompt = (scene_tasks.picture(facts, level), Text("describe it"))
    answer = scenes.full_caption(index)
    return TaskItem(level, facts, prompt, (Text(answer),), (facts,), (answer,))


def judge_caption(item: TaskItem, text: str) -> Scores:
    """`right`: it is the caption that states all facts; `entity`, `place`, `color`: it states these."""
    words = f" {scene_tasks.normalize(text)} "
    (facts,) = item.facts
    names = [art.load_art().names[entity.class_id] for entity in facts.entities]
    places = [emoji_scenes.place(entity, item.level) for entity in facts.entities]
    return {
        **scene_questions.judge_answer(item, text),
        "entity": all(any(f" {name} " in words for name in own) for own in names),
        "place": all(re.search(f" the {place} (on|and) ", words) for place in places),
        "color": f" {facts.color} background " in words,
    }


CAPTION = SceneTask("caption", _make_caption, scene_tasks.score_texts(judge_caption))
