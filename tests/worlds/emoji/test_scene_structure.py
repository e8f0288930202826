"""Boxes in words, silhouettes and edges: what they are, and that they fix the scene."""

import itertools

import numpy as np
import pytest

from rag_mm.core.document_types import Image
from rag_mm.worlds.emoji import (
    art,
    class_splits,
    emoji_scenes,
    scene_boxes,
    scene_structure,
    scene_tasks,
)
from rag_mm.worlds.emoji.emoji_scenes import LEVELS, Entity, Facts

PAIRS, FREE = LEVELS["pairs"], LEVELS["free"]
every_level = pytest.mark.parametrize("level", LEVELS.values(), ids=lambda level: level.name)
NAMES = art.load_art().names


@every_level
def test_boxes_in_words_are_read_back_exactly(level):
    for class_id in range(0, len(NAMES), 20):
        for facts in emoji_scenes.configurations(level, class_id):
            for pick in (0, -1):
                names = [NAMES[e.class_id][pick] for e in facts.entities]
                told = scene_boxes.tell_boxes(facts, names)
                assert scene_boxes.parse_boxes(told, level) == facts


def test_boxes_are_left_top_right_bottom():
    facts = Facts((Entity(7, 16, 0, 8), Entity(8, 16, 16, 16)), "red")
    words = f"{NAMES[7][0]} at 8 0 to 24 16 and {NAMES[8][0]} at 16 16 to 32 32 on a red background"
    assert scene_boxes.tell_boxes(facts, [NAMES[7][0], NAMES[8][0]]) == words


@pytest.mark.parametrize(
    "text",
    [
        "",
        "apple",
        "apple on a red background",
        "apple at 0 0 to 24 24",
        "apple at 0 0 to 24 on a red background",
        "apple at 0 0 to 24 16 on a red background",
        "apple at 16 16 to 40 40 on a red background",
        "apple at 8 8 to 8 8 on a red background",
        "apple at 0 0 to 24 24 and on a red background",
        "apple at 0 0 to 24 24 pear on a red background",
    ],
)
def test_what_has_no_boxes_is_all_wrong(text):
    assert scene_boxes.parse_boxes(text, FREE) is None
    item = scene_tasks.TaskItem(FREE, (), (), (), (Facts((Entity(7, 24, 0, 0),), "red"),))
    assert scene_boxes.judge_told(item, text) == {
        "entity": False, "place": False, "color": False, "box": False, "joint": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{0} at 8 0 to 32 24 on a red background", set()),
        ("THE {0}  at 8 0 to 32 24 on a red background.", set()),
        ("{1} at 8 0 to 32 24 on a red background", {"entity"}),
        ("nonsense at 8 0 to 32 24 on a red background", {"entity"}),
        ("{0} at 0 0 to 24 24 on a red background", {"place", "box"}),
        ("{0} at 7 0 to 31 24 on a red background", {"box"}),
        ("{0} at 8 0 to 32 24 on a blue background", {"color"}),
        (
            "{0} at 8 0 to 32 24 and {1} at 0 0 to 8 8 on a red background",
            {"entity", "place", "box"},
        ),
    ],
)
def test_told_boxes_are_scored_part_by_part(text, wrong):
    asked = Facts((Entity(7, 24, 0, 8),), "red")
    item = scene_tasks.TaskItem(FREE, asked, (), (), (asked,))
    right = scene_boxes.judge_told(item, text.format(NAMES[7][0], NAMES[8][0]))
    assert {key for key, value in right.items() if not value} == wrong | (
        {"joint"} if wrong else set()
    )


def test_a_silhouette_is_the_art_without_its_card():
    facts = Facts((Entity(7, 16, 0, 3), Entity(8, 16, 16, 13)), "red")
    drawn = scene_structure.silhouette(facts, PAIRS)
    assert drawn.shape == (32, 32, 3) and set(np.unique(drawn)) == {0, 255}
    expected = np.zeros((32, 32), bool)
    expected[:16, 3:19] = art.load_art().rgba(7, 16)[..., 3] > 127
    expected[16:, 13:29] = art.load_art().rgba(8, 16)[..., 3] > 127
    np.testing.assert_array_equal(drawn == 255, np.repeat(expected[..., None], 3, -1))
    np.testing.assert_array_equal(drawn, scene_structure.silhouette(facts, FREE))


def test_an_edge_lies_left_of_and_above_a_step_of_more_than_32():
    image = np.full((4, 4, 3), 100, np.uint8)
    image[1:3, 1:3] = (100, 133, 100)  # One channel is enough.
    image[3, 3] = 132  # No more than 32.
    expected = np.zeros((4, 4), bool)
    expected[0, 1:3] = expected[1:3, 0] = True  # Above and left of the square,
    expected[2, 1:3] = expected[1:3, 2] = True  # and its last row and column.
    np.testing.assert_array_equal(scene_structure.edges(image)[..., 0] == 255, expected)


def faint_classes():
    ids = class_splits.classes("tune", "test", "common", "rare_seen")
    return [int(i) for i in ids if len(emoji_scenes.visible_colors(FREE, int(i))) < 7]


@every_level
@pytest.mark.parametrize("name", ["silhouette", "edges_of_scene"])
def test_names_color_and_structure_leave_one_scene(level, name):
    """Single entities anywhere; pairs at every two boxes in the order of their names."""
    structure = getattr(scene_structure, name)
    boxes = [(size, *corner) for size in level.sizes for corner in level.corners(size)]
    for class_id in (*faint_classes()[:3], 11, 800):
        facts = emoji_scenes.configurations(level, class_id)[0]
        color = facts.color
        shown = structure(facts, level)
        same = [
            box
            for box in boxes
            if np.array_equal(structure(Facts((Entity(class_id, *box),), color), level), shown)
        ]
        assert [Entity(class_id, *box) for box in same] == list(facts.entities)


def test_names_from_top_to_bottom_tell_two_silhouettes_apart():
    rng = np.random.default_rng(0)
    ids = class_splits.classes("tune")
    for class_id in ids[:12].tolist():
        facts = emoji_scenes.configurations(PAIRS, class_id)[-1]
        first, second = sorted(facts.entities, key=lambda e: (e.row, e.column))
        told = scene_structure.caption_without_places(facts, rng)
        names = [NAMES[e.class_id] for e in (first, second)]
        assert told in {
            f"{one} and {two} on a {facts.color} background"
            for one, two in itertools.product(*names)
        }
        shown = scene_structure.silhouette(facts, PAIRS)
        same = []
        for one, two in emoji_scenes.disjoint_corners(PAIRS):
            pair = (Entity(first.class_id, 16, *one), Entity(second.class_id, 16, *two))
            if one < two and np.array_equal(
                scene_structure.silhouette(Facts(pair, "red"), PAIRS), shown
            ):
                same.append(pair)
        assert same == [(first, second)]


def test_a_structure_is_scored_by_its_white_pixels():
    wanted = np.zeros((4, 4, 3), np.uint8)
    wanted[:2] = 255
    item = scene_tasks.TaskItem(FREE, (), (), (Image(wanted),), ())
    assert scene_structure.judge_structure(item, [wanted // 4 * 3]) == {
        "iou": 1.0, "equal": 1.0, "exact": True,
    }  # fmt: skip
    half = wanted.copy()
    half[0] = 0
    assert scene_structure.judge_structure(item, [half]) == {
        "iou": 0.5, "equal": 0.75, "exact": False,
    }  # fmt: skip
    assert scene_structure.judge_structure(item, [255 - wanted]) == {
        "iou": 0.0, "equal": 0.0, "exact": False,
    }  # fmt: skip
