"""Boxes with names: their JSON, what is no box in an image, and their words."""

import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import named_boxes
from rag_mm.worlds.emoji import scene_boxes
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts

BOXES = [("apple", (8, 0, 32, 24)), ("pear", (0, 24, 8, 32))]


def test_a_file_is_read(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text('[{"name": " apple\\n", "box": [8, 0, 32, 24], "color": "red"}]')
    assert named_boxes.check(named_boxes.read(path), 32) == [("apple", (8, 0, 32, 24))]
    with pytest.raises(UserError, match=r"no\.json cannot be read: No such file"):
        named_boxes.read(tmp_path / "no.json")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[1]", '{"name": "a", "box": [0, 0, 1, 1]}', '[{"name": "a"}]', b"\xff", "[" * 9999],
)  # fmt: skip
def test_what_is_no_list_of_boxes_is_refused_in_one_sentence(text):
    with pytest.raises(UserError) as refused:
        named_boxes.parse(text, "b.json")
    assert (
        str(refused.value).startswith("b.json is not a JSON list [{")
        and len(str(refused.value)) < 200
    )


@pytest.mark.parametrize(
    ("box", "shown"),
    [
        ((0, 0, 33, 9), "[0, 0, 33, 9]"),
        ((-1, 0, 9, 9), "[-1, 0, 9, 9]"),
        ((0, 30, 9, 33), "[0, 30, 9, 33]"),
        ((9, 0, 9, 9), "[9, 0, 9, 9]"),
        ((9, 0, 8, 9), "[9, 0, 8, 9]"),
        ([0, 0, 8.0, 9], "[0, 0, 8.0, 9]"),
        ([0, 0, True, 9], "[0, 0, True, 9]"),
        ([0, 0, 9], "[0, 0, 9]"),
        ("0 0 9 9", "'0 0 9 9'"),
        (None, "None"),
        ([0] * 999, "[0, 0, 0"),
    ],
)
def test_a_box_outside_of_the_image_is_named(box, shown):
    with pytest.raises(UserError) as refused:
        named_boxes.check([*BOXES, ("plum", box)], 32)
    said = str(refused.value)
    assert said.startswith(f"Box 3, 'plum', is {shown}") and len(said) < 250
    assert said.endswith("give [left, top, right, bottom] from 0 to 32.")


@pytest.mark.parametrize("name", ["", " \n", None, 3])
def test_a_box_has_a_name(name):
    with pytest.raises(UserError, match=r"Box 1 has the name .*; give a text"):
        named_boxes.check([(name, (0, 0, 1, 1))], 32)


def test_words_are_those_of_scenes():
    facts = Facts((Entity(0, 24, 0, 8), Entity(1, 8, 24, 0)), "red")
    told = scene_boxes.tell_boxes(facts, ["apple", "pear"])
    assert f"{named_boxes.tell(named_boxes.check(BOXES, 32))} on a red background" == told
    assert named_boxes.tell_names(named_boxes.check(BOXES, 32)) == "apple and pear"
