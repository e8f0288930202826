"""Stories: 2 to 4 images, each with a sentence that says what changes in it.

An item gives the first sentence, the first image and the second sentence. Wanted are the other images,
with the sentences between them.
"""

import itertools

import numpy as np

from rag_mm.core.document_types import Segment, Text
from rag_mm.worlds.emoji import emoji_scenes, scene_edits, scene_facts, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Facts, Level, Scenes
from rag_mm.worlds.emoji.scene_tasks import SceneTask, Scores, TaskItem

MAX_IMAGES = 4
_NUM_GIVEN = 3  # Segments of the prompt.


def sample_story(facts: Facts, level: Level, rng: np.random.Generator) -> tuple[Facts, ...]:
    """The facts of 2 to 4 images: a move or a new background each time, and no scene twice."""
    story = [facts]
    num_images = int(rng.integers(2, MAX_IMAGES + 1))
    while len(story) < num_images:
        change = (scene_edits.moved, scene_edits.recolored)[rng.integers(2)]
        after = change(story[-1], level, rng)
        if after not in story:
            story.append(after)
    return tuple(story)


def tell_step(before: Facts, after: Facts, level: Level) -> str:
    """What changes, for instance `then the apple moves to the top left`."""
    if before.color != after.color:
        return f"then the background turns {after.color}"
    entity = after.entities[scene_edits.changed_entity(before, after)]
    place = emoji_scenes.place(entity, level)
    return f"then the {scene_tasks.first_name(entity)} moves to the {place}"


def judge_story(item: TaskItem, read: list[Facts]) -> Scores:
    """Keys `image_2` to `image_4`, as many as are wanted, and `joint` for all of them.

    An image is right if class, place and color of all its entities are (`scene_facts.compare`).
    """
    pairs = zip(read, item.facts, strict=True)
    right = [scene_facts.compare(got, asked, item.level)["joint"] for got, asked in pairs]
    return {f"image_{i}": one for i, one in enumerate(right, 2)} | {"joint": all(right)}


def _make(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    level = scenes.levels[index]
    story = sample_story(scenes.facts(index), level, rng)
    segments: list[Segment] = [
        Text(scenes.full_caption(index)),
        scene_tasks.picture(story[0], level),
    ]
    for before, after in itertools.pairwise(story):
        segments += [Text(tell_step(before, after, level)), scene_tasks.picture(after, level)]
    prompt, target = tuple(segments[:_NUM_GIVEN]), tuple(segments[_NUM_GIVEN:])
    return TaskItem(level, story[0], prompt, target, story[1:])


STORY = SceneTask("story", _make, scene_tasks.score_facts(judge_story))
