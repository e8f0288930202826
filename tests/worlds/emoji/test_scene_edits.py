"""Edits change what they say, in one way only, and their scorers tell what was done from what was kept."""

import dataclasses
import re

import numpy as np
import pytest

from rag_mm.core.document_types import Image, Text
from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import (
    art,
    class_splits,
    emoji_scenes,
    scene_edits,
    scene_facts,
    scene_stories,
    scene_tasks,
)
from rag_mm.worlds.emoji.emoji_scenes import LEVELS, Entity, Facts, Scenes

PAIRS, FREE = LEVELS["pairs"], LEVELS["free"]
RED_PAIR = Facts((Entity(7, 16, 0, 0), Entity(8, 16, 16, 16)), "red")
every_level = pytest.mark.parametrize("level", LEVELS)


def items_of(task, level, split="tune", count=40):
    """Classes that are not visible on every color come first."""
    ids = class_splits.classes(split)
    faint = [i for i in ids if len(emoji_scenes.visible_colors(FREE, int(i))) < 8]
    chosen = np.unique([*faint, *ids[:count]])
    items = scene_tasks.TaskItems(task, Scenes(level, chosen, "memory"))
    return [items[i] for i in range(0, len(items), 3)]


def item_of(before, after):
    return scene_tasks.TaskItem(PAIRS, before, (), (scene_tasks.picture(after, PAIRS),), (after,))


def instruction(item):
    return item.prompt[-1].text


@every_level
@pytest.mark.parametrize("name", ["RECOLOR", "MOVE", "SWAP"])
def test_every_edit_changes_the_picture_and_shows_every_entity(level, name):
    for item in items_of(getattr(scene_edits, name), level):
        (after,) = item.facts
        drawn = emoji_scenes.render(after, item.level)
        np.testing.assert_array_equal(item.target[0].pixels, drawn)
        before = emoji_scenes.render(item.source, item.level)
        np.testing.assert_array_equal(item.prompt[0].pixels, before)
        changed = np.sqrt(((drawn / 255 - before / 255) ** 2).mean())
        assert changed > 0.02
        for e in after.entities:
            assert min(e.row, e.column) >= 0 and max(e.row, e.column) + e.size <= 32
            box = drawn[e.row : e.row + e.size, e.column : e.column + e.size] / 255
            plain = np.array(emoji_scenes.COLORS[after.color]) / 255
            assert np.sqrt(((box - plain) ** 2).mean()) > 0.066
        if len(after.entities) == 2:
            one, two = after.entities
            assert max(abs(one.row - two.row), abs(one.column - two.column)) >= 16


@every_level
def test_recoloring_has_one_result(level):
    for item in items_of(scene_edits.RECOLOR, level):
        color = instruction(item).removeprefix("change the background to ")
        assert item.facts == (dataclasses.replace(item.source, color=color),)


@every_level
def test_a_move_has_one_result(level):
    for item in items_of(scene_edits.MOVE, level):
        name, place = re.fullmatch(r"move the (.+) to the (.+)", instruction(item)).groups()
        (mover,) = [e for e in item.source.entities if name in art.load_art().names[e.class_id]]
        results = []
        for row, column in item.level.corners(mover.size):
            there = dataclasses.replace(mover, row=row, column=column)
            told = emoji_scenes.caption(Facts((there,), "red"), item.level, None, drop=False)
            if f" at the {place} on " in told:
                results.append(there)
        assert len(results) == 1 and emoji_scenes.place(mover, item.level) != place
        kept = [e for e in item.source.entities if e != mover]
        assert sorted(map(repr, item.facts[0].entities)) == sorted(map(repr, [*results, *kept]))
        assert item.facts[0].color == item.source.color


@every_level
@pytest.mark.parametrize("split", ["common", "test"])
def test_a_swap_takes_the_entity_of_the_second_image(level, split):
    ids = set(class_splits.classes(split).tolist())
    for item in items_of(scene_edits.SWAP, level, split, count=12)[::4]:
        (after,) = item.facts
        number = scene_edits.changed_entity(item.source, after)
        old, new = item.source.entities[number], after.entities[number]
        assert dataclasses.replace(new, class_id=old.class_id) == old
        assert new.class_id in ids - {e.class_id for e in item.source.entities}
        name = re.fullmatch(r"replace the (.+) with the one in .+", instruction(item))[1]
        assert name in art.load_art().names[old.class_id]
        assert [type(one) for one in item.prompt] == [Image, Image, Text]


def test_the_second_image_shows_what_comes_in_alone():
    items = items_of(scene_edits.SWAP, "pairs", count=8)[::8]
    second = scene_facts.read(
        np.stack([item.prompt[1].pixels for item in items]), [PAIRS] * len(items)
    )
    for item, shown in zip(items, second, strict=True):
        (after,) = item.facts
        number = scene_edits.changed_entity(item.source, after)
        assert [e.class_id for e in shown.entities] == [after.entities[number].class_id]


def test_a_swap_without_another_class_of_the_split_is_refused():
    one_each = np.array([class_splits.classes("common")[0], class_splits.classes("test")[0]])
    items = scene_tasks.TaskItems(scene_edits.SWAP, Scenes("easy", np.sort(one_each), "test"))
    with pytest.raises(UserError, match="take more classes of its split"):
        items[0]


@pytest.mark.parametrize(
    ("got", "compliance", "fidelity"),
    [
        (Facts(RED_PAIR.entities, "blue"), True, True),
        (Facts(RED_PAIR.entities[::-1], "blue"), True, True),
        (RED_PAIR, False, True),
        (Facts(RED_PAIR.entities, "green"), False, True),
        (Facts(RED_PAIR.entities[:1], "blue"), True, False),
        (Facts((Entity(9, 16, 0, 0), RED_PAIR.entities[1]), "blue"), True, False),
        (Facts((Entity(7, 16, 0, 8), RED_PAIR.entities[1]), "blue"), True, False),
        (Facts((Entity(7, 24, 0, 0),), "blue"), True, False),
    ],
)
def test_a_recoloring_is_scored_by_color_and_by_what_was_kept(got, compliance, fidelity):
    item = item_of(RED_PAIR, Facts(RED_PAIR.entities, "blue"))
    assert scene_edits.judge_recolor(item, [got]) == {
        "compliance": compliance,
        "fidelity": fidelity,
        "joint": compliance and fidelity,
    }


@pytest.mark.parametrize(
    ("got", "compliance", "fidelity"),
    [
        (Facts((Entity(7, 16, 0, 16), Entity(8, 16, 16, 16)), "red"), True, True),
        (RED_PAIR, False, True),
        (Facts((Entity(7, 16, 16, 0), Entity(8, 16, 16, 16)), "red"), False, True),
        (Facts((Entity(7, 16, 0, 16), Entity(8, 16, 16, 0)), "red"), True, False),
        (Facts((Entity(7, 16, 0, 16), Entity(8, 16, 16, 16)), "blue"), True, False),
        (Facts((Entity(9, 16, 0, 16), Entity(8, 16, 16, 16)), "red"), False, False),
        (Facts((Entity(7, 16, 0, 16),), "red"), True, False),
    ],
)
def test_a_move_is_scored_by_place_and_by_what_was_kept(got, compliance, fidelity):
    item = item_of(RED_PAIR, Facts((Entity(7, 16, 0, 16), Entity(8, 16, 16, 16)), "red"))
    assert scene_edits.judge_move(item, [got]) == {
        "compliance": compliance,
        "fidelity": fidelity,
        "joint": compliance and fidelity,
    }


@pytest.mark.parametrize(
    ("got", "compliance", "fidelity"),
    [
        (Facts((Entity(9, 16, 0, 0), Entity(8, 16, 16, 16)), "red"), True, True),
        (RED_PAIR, False, True),
        (Facts((Entity(7, 16, 0, 0), Entity(9, 16, 16, 16)), "red"), False, False),
        (Facts((Entity(8, 16, 0, 0), Entity(9, 16, 16, 16)), "red"), True, False),
        (Facts((Entity(9, 16, 0, 8), Entity(8, 16, 16, 16)), "red"), True, False),
        (Facts((Entity(9, 16, 0, 0), Entity(8, 16, 16, 16)), "pink"), True, False),
        (Facts((Entity(9, 16, 0, 0),), "red"), False, False),
    ],
)
def test_a_swap_is_scored_by_class_and_by_what_was_kept(got, compliance, fidelity):
    item = item_of(RED_PAIR, Facts((Entity(9, 16, 0, 0), Entity(8, 16, 16, 16)), "red"))
    assert scene_edits.judge_swap(item, [got]) == {
        "compliance": compliance,
        "fidelity": fidelity,
        "joint": compliance and fidelity,
    }


@every_level
def test_a_story_changes_one_thing_at_a_time_and_says_which(level):
    ids = class_splits.classes("tune")[:30]
    items = scene_tasks.TaskItems(scene_stories.STORY, Scenes(level, ids, "train"))
    lengths = set()
    for i in range(0, len(items), 3):
        item = items[i]
        story = [item.source, *item.facts]
        lengths.add(len(story))
        assert len(set(story)) == len(story)
        told = items.document(i)
        kinds = [type(segment) for segment in told.segments]
        assert kinds == [Text, Image] * len(story)
        assert told.segments[0].text == items.scenes.full_caption(i)
        for facts, shown in zip(story, told.segments[1::2], strict=True):
            np.testing.assert_array_equal(shown.pixels, emoji_scenes.render(facts, item.level))
        for before, after, said in zip(story, story[1:], told.segments[2::2], strict=False):
            if before.color != after.color:
                assert before.entities == after.entities
                assert said.text == f"then the background turns {after.color}"
            else:
                number = scene_edits.changed_entity(before, after)
                entity = after.entities[number]
                name = art.load_art().names[entity.class_id][0]
                place = emoji_scenes.place(entity, item.level)
                assert said.text == f"then the {name} moves to the {place}"
    assert lengths == {2, 3, 4}


def test_a_story_is_scored_image_by_image():
    blue = Facts(RED_PAIR.entities, "blue")
    moved = Facts((Entity(7, 16, 0, 16), Entity(8, 16, 16, 16)), "blue")
    item = scene_tasks.TaskItem(PAIRS, RED_PAIR, (), (), (blue, moved))
    assert scene_stories.judge_story(item, [blue, moved]) == {
        "image_2": True, "image_3": True, "joint": True,
    }  # fmt: skip
    assert scene_stories.judge_story(item, [blue, blue]) == {
        "image_2": True, "image_3": False, "joint": False,
    }  # fmt: skip
    assert scene_stories.judge_story(item, [moved, blue]) == {
        "image_2": False, "image_3": False, "joint": False,
    }  # fmt: skip
