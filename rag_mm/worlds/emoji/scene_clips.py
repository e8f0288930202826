"""Clips: 8 frames of one entity that moves left, right, up or down, to be drawn, told, or asked about.

An entity of 24 pixels moves by one pixel a frame, one of 16 by two, and stays inside the image. Emu, too,
takes 8 frames of a video, each as an image, in order of time.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from rag_mm.core.document_types import Image, Segment, Text
from rag_mm.worlds.emoji import emoji_scenes, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Facts, Level, Scenes
from rag_mm.worlds.emoji.scene_questions import judge_answer
from rag_mm.worlds.emoji.scene_tasks import SceneTask, Scores, TaskItem

NUM_FRAMES = 8
# Change of (row, column) from frame to frame.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
_CAPTION = re.compile(r"(.+) moving (\w+) on a (\w+) background")


def clip_level(level: Level) -> Level:
    """The level by which frames are read: one entity at any pixel, drawn as in `level`."""
    return dataclasses.replace(level, step=1, max_entities=1)


def sample_clip(facts: Facts, level: Level, rng: np.random.Generator) -> tuple[Facts, ...]:
    """The facts of 8 frames in which the first entity of a scene moves in one direction, alone.

    Across that direction it keeps its offset; along it the start is random, as far as there is space.
    """
    down, right = tuple(DIRECTIONS.values())[rng.integers(len(DIRECTIONS))]
    entity = facts.entities[0]
    span = level.image_size - entity.size
    speed = span // (NUM_FRAMES - 1)
    path = int(rng.integers(span - speed * (NUM_FRAMES - 1) + 1)) + speed * np.arange(NUM_FRAMES)
    if down + right < 0:
        path = path[::-1]
    axis = "row" if down else "column"
    return tuple(
        Facts((dataclasses.replace(entity, **{axis: offset}),), facts.color)
        for offset in path.tolist()
    )


def direction_of(frames: Sequence[Facts]) -> str | None:
    """The direction in which the first entity moves, or None if it is none of the four.

    It must get somewhere along one axis, further than across it, without a step back.
    """
    offsets = np.array([(one.entities[0].row, one.entities[0].column) for one in frames])
    steps = np.diff(offsets, axis=0)
    whole = steps.sum(0)
    axis = int(np.abs(whole).argmax())
    sign = int(np.sign(whole[axis]))
    if abs(whole[0]) == abs(whole[1]) or (sign * steps[:, axis] < 0).any():
        return None
    wanted = (sign, 0) if axis == 0 else (0, sign)
    return next(name for name, step in DIRECTIONS.items() if step == wanted)


def draw_clip(frames: Sequence[Facts], level: Level) -> np.ndarray:
    """The frames of a clip: uint8 [8, S, S, 3]."""
    return np.stack([emoji_scenes.render(one, level) for one in frames])


def clip_caption(name: str, frames: Sequence[Facts]) -> str:
    """Describes a clip, for instance `apple moving left on a red background`."""
    return f"{name} moving {direction_of(frames)} on a {frames[0].color} background"


def judge_drawn_clip(item: TaskItem, read: list[Facts]) -> Scores:
    """Keys `entity` and `color`, right in every frame, `direction`, and `joint` for all of them."""
    class_id, color = item.facts[0].entities[0].class_id, item.facts[0].color
    return _verdict(
        all(one.entities[0].class_id == class_id for one in read),
        all(one.color == color for one in read),
        direction_of(read) == direction_of(item.facts),
    )


def judge_told_clip(item: TaskItem, text: str) -> Scores:
    """Keys `entity`, `color`, `direction` and `joint`; all wrong if the text is no caption of a clip."""
    said = _CAPTION.fullmatch(scene_tasks.normalize(text))
    if said is None:
        return _verdict(False, False, False)
    return _verdict(
        scene_tasks.class_of_name(said[1]) == item.facts[0].entities[0].class_id,
        said[3] == item.facts[0].color,
        said[2] == direction_of(item.facts),
    )


def _verdict(entity: bool, color: bool, direction: bool) -> Scores:
    joint = entity and color and direction
    return {"entity": entity, "color": color, "direction": direction, "joint": joint}


def _frames(facts: Sequence[Facts], level: Level) -> tuple[Image, ...]:
    return tuple(Image(frame) for frame in draw_clip(facts, level))


def _make_draw(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    clip = sample_clip(facts, level, rng)
    caption = clip_caption(scene_tasks.any_name(facts.entities[0], rng), clip)
    return TaskItem(level, facts, (Text(caption),), _frames(clip, level), clip)


def _make_tell(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    clip = sample_clip(facts, level, rng)
    caption = clip_caption(scene_tasks.first_name(facts.entities[0]), clip)
    prompt: tuple[Segment, ...] = (*_frames(clip, level), Text("describe the clip"))
    return TaskItem(level, facts, prompt, (Text(caption),), clip)


def _make_ask(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    clip = sample_clip(facts, level, rng)
    answer = str(direction_of(clip))
    prompt: tuple[Segment, ...] = (*_frames(clip, level), Text("which way does it move?"))
    return TaskItem(
        level, facts, prompt, (Text(answer),), clip, answers=(answer,), choices=tuple(DIRECTIONS)
    )


DRAW_CLIP = SceneTask(
    "draw_clip", _make_draw, scene_tasks.score_facts(judge_drawn_clip, clip_level)
)
TELL_CLIP = SceneTask("tell_clip", _make_tell, scene_tasks.score_texts(judge_told_clip))
WHICH_WAY = SceneTask("which_way", _make_ask, scene_tasks.score_texts(judge_answer))
