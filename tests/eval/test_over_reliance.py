"""What counts as copied from a document against the caption, and among which images."""

import numpy as np
import pytest

from rag_mm.eval import over_reliance
from rag_mm.worlds.emoji import emoji_scenes
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts

EASY = emoji_scenes.LEVELS["easy"]
LEFT, RIGHT = (0, 0), (0, 8)


def scene(corner, color):
    return Facts((Entity(7, 24, *corner),), color)


# The caption of all asks for an entity at the top left on red.
ASKED = scene(LEFT, "red")
ELSEWHERE, ALIKE = scene(RIGHT, "blue"), scene(LEFT, "red")


def copied(image, documents):
    """{figure: (is copied, could be)} of one image, whose codes are those of no document."""
    codes = [[np.ones(4) for _ in documents]]
    found = over_reliance.measure([image], [ASKED], [documents], EASY, np.zeros((1, 4)), codes)
    return {
        name: (bool(each.is_copied[0]), bool(each.is_eligible[0])) for name, each in found.items()
    }


def test_a_documents_place_and_color_are_copied_where_the_caption_asks_for_others():
    found = copied(scene(RIGHT, "red"), [ELSEWHERE])
    assert found["copied_place"] == (True, True) and found["copied_color"] == (False, True)
    found = copied(scene(LEFT, "blue"), [ELSEWHERE])
    assert found["copied_place"] == (False, True) and found["copied_color"] == (True, True)


def test_where_one_document_agrees_with_the_caption_nothing_can_be_told():
    found = copied(scene(RIGHT, "blue"), [ELSEWHERE, ALIKE])
    assert found["copied_place"] == found["copied_color"] == (False, False)


def test_an_error_that_no_document_has_is_no_copy():
    found = copied(scene((8, 8), "green"), [ELSEWHERE])
    assert found["copied_place"] == found["copied_color"] == (False, True)


def test_without_documents_nothing_is_copied():
    found = copied(scene(RIGHT, "blue"), [])
    assert set(found.values()) == {(False, False)}


def test_a_whole_image_is_copied_code_by_code():
    codes = np.array([[1, 2, 3], [1, 2, 4]])
    documents = [[np.array([9, 9, 9]), np.array([1, 2, 3])], [np.array([1, 2, 3])]]
    found = over_reliance.measure(
        [ASKED] * 2, [ASKED] * 2, [[ALIKE], [ALIKE]], EASY, codes, documents
    )["copied_whole"]
    assert found.is_copied.tolist() == [True, False] and found.is_eligible.all()


def test_values_per_image_average_to_the_share_among_those_that_could_be():
    """One of two that could be copied is; the two others have a document that agrees with the caption."""
    images = [scene(RIGHT, "red")] + [ASKED] * 3
    documents = [[ELSEWHERE], [ELSEWHERE], [ALIKE], [ELSEWHERE, ALIKE]]
    found = over_reliance.measure(
        images, [ASKED] * 4, documents, EASY, np.zeros((4, 2)), [[np.ones(2)]] * 4
    )
    share = over_reliance.accuracies(found)["copied_place"]
    assert (share["accuracy"], share["n"]) == (0.5, 2)
    values = over_reliance.per_document(found)["copied_place"]
    assert values.shape == (4,) and values.mean() == pytest.approx(0.5)


def test_a_share_of_none_is_left_out():
    found = over_reliance.measure([ASKED], [ASKED], [[ALIKE]], EASY, np.zeros((1, 2)), [[]])
    assert over_reliance.accuracies(found) == {}
    assert over_reliance.per_document(found)["copied_place"].tolist() == [0]
