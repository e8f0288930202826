"""Clips move one way, inside the image, and their direction is read from their frames."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest

from rag_mm.core.document_types import Image
from rag_mm.worlds.emoji import art, class_splits, scene_clips, scene_facts, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import LEVELS, Entity, Facts, Scenes

SIZES = LEVELS["sizes"]


def path(*corners, class_id=7, color="red"):
    return [Facts((Entity(class_id, 16, row, column),), color) for row, column in corners]


RIGHT = path(*((4, 2 * i) for i in range(8)))


def clip_item(frames):
    return scene_tasks.TaskItem(SIZES, frames[0], (), (), tuple(frames))


@pytest.mark.parametrize("level", LEVELS)
def test_eight_frames_move_by_equal_steps_inside_the_image(level):
    ids = class_splits.classes("tune")[:20]
    scenes = Scenes(level, ids, "train")
    items = scene_tasks.TaskItems(scene_clips.DRAW_CLIP, scenes)
    directions = Counter()
    for i in range(len(items)):
        frames = items[i].facts
        assert len(frames) == 8 and len({(f.color, len(f.entities)) for f in frames}) == 1
        entities = [f.entities[0] for f in frames]
        first = scenes.facts(i).entities[0]
        assert {(e.class_id, e.size) for e in entities} == {(first.class_id, first.size)}
        assert all(0 <= e.row <= 32 - e.size and 0 <= e.column <= 32 - e.size for e in entities)
        steps = {
            (two.row - one.row, two.column - one.column)
            for one, two in itertools.pairwise(entities)
        }
        (step,) = steps
        speed = 2 if first.size == 16 else 1
        name = {(0, -speed): "left", (0, speed): "right", (-speed, 0): "up", (speed, 0): "down"}[
            step
        ]
        directions[name] += 1
        assert f" moving {name} on a {frames[0].color} background" in items[i].prompt[0].text
    assert set(directions) == {"left", "right", "up", "down"}
    assert min(directions.values()) > len(items) / 8


def test_the_direction_of_frames_is_one_of_four_or_none():
    assert scene_clips.direction_of(RIGHT) == "right"
    assert scene_clips.direction_of(RIGHT[::-1]) == "left"
    down = path(*((2 * i, 4) for i in range(8)))
    assert scene_clips.direction_of(down) == "down"
    assert scene_clips.direction_of(down[::-1]) == "up"
    assert scene_clips.direction_of(RIGHT[:4] + RIGHT[3:7]) == "right"  # It may pause,
    assert scene_clips.direction_of(RIGHT[:1] * 8) is None  # but not rest,
    assert scene_clips.direction_of([*RIGHT[:3], RIGHT[1], *RIGHT[4:]]) is None  # or go back.
    assert scene_clips.direction_of(path(*((i, i) for i in range(8)))) is None


def test_a_drawn_clip_is_scored_by_entity_color_and_direction():
    item = clip_item(RIGHT)
    right = {"entity": True, "color": True, "direction": True, "joint": True}
    assert scene_clips.judge_drawn_clip(item, RIGHT) == right
    lower = path(*((9, 2 * i) for i in range(8)))
    assert scene_clips.judge_drawn_clip(item, lower) == right  # No caption says where.
    for frames, wrong in (
        (RIGHT[::-1], "direction"),
        (RIGHT[:1] * 8, "direction"),
        ([*RIGHT[:7], *path((4, 14), class_id=8)], "entity"),
        ([*RIGHT[:7], *path((4, 14), color="blue")], "color"),
    ):
        expected = {**right, wrong: False, "joint": False}
        assert scene_clips.judge_drawn_clip(item, frames) == expected


def test_a_reversed_clip_is_read_as_wrong_from_its_pixels():
    items = scene_tasks.TaskItems(
        scene_clips.DRAW_CLIP, Scenes("sizes", class_splits.classes("test")[:3], "test")
    )
    chosen = [items[i] for i in range(0, len(items), 3)]
    for score in scene_clips.DRAW_CLIP.score(chosen, [item.target[::-1] for item in chosen]):
        assert score == {"entity": True, "color": True, "direction": False, "joint": False}
    stills = [item.target[:1] * 8 for item in chosen]
    assert not any(s["direction"] for s in scene_clips.DRAW_CLIP.score(chosen, stills))


def test_frames_are_read_at_any_pixel():
    level = scene_clips.clip_level(LEVELS["easy"])
    frames = [Facts((Entity(7, 24, 3, i),), "cyan") for i in range(8)]
    drawn = scene_clips.draw_clip(frames, LEVELS["easy"])
    assert drawn.shape == (8, 32, 32, 3) and drawn.dtype == np.uint8
    assert scene_facts.read(drawn, [level] * 8) == frames
    assert dataclasses.replace(level, step=8) == LEVELS["easy"]


def test_a_told_clip_is_scored_by_entity_color_and_direction():
    item = clip_item(RIGHT)
    name = art.load_art().names[7][0]
    right = {"entity": True, "color": True, "direction": True, "joint": True}
    assert scene_clips.clip_caption(name, RIGHT) == f"{name} moving right on a red background"
    said = f"The {name} moving right on a red background."
    assert scene_clips.judge_told_clip(item, said) == right
    for old, new, wrong in (
        ("right", "left", "direction"),
        (name, "gherkin", "entity"),
        ("red", "blue", "color"),
    ):
        expected = {**right, wrong: False, "joint": False}
        assert scene_clips.judge_told_clip(item, said.replace(old, new)) == expected
    assert not any(scene_clips.judge_told_clip(item, name).values())


def test_which_way_shows_eight_frames_and_takes_one_word():
    items = scene_tasks.TaskItems(
        scene_clips.WHICH_WAY, Scenes("free", class_splits.classes("test")[:3], "test")
    )
    item = items[0]
    assert [type(one) for one in item.prompt[:8]] == [Image] * 8 and len(item.prompt) == 9
    (answer,) = item.answers
    for choice in item.choices:
        score = items.task.score([item], [(dataclasses.replace(item.target[0], text=choice),)])
        assert score == [{"right": choice == answer}]
