"""Facts right or wrong per document, and NLL per code and per art code."""

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.eval import scene_accuracy
from rag_mm.worlds.emoji import emoji_scenes

EASY = emoji_scenes.LEVELS["easy"]


def fact(class_id=3, row=0, column=0, color="red"):
    entity = emoji_scenes.Entity(class_id=class_id, size=24, row=row, column=column)
    return emoji_scenes.Facts(entities=(entity,), color=color)


def test_joint_needs_every_fact():
    asked = [fact()] * 4
    read = [fact(), fact(class_id=4), fact(column=8), fact(color="blue")]
    right = scene_accuracy.outcomes(read, asked, EASY)
    assert right["entity"].tolist() == [True, False, True, True]
    assert right["place"].tolist() == [True, True, False, True]
    assert right["color"].tolist() == [True, True, True, False]
    assert right["joint"].tolist() == [True, False, False, False]
    table = scene_accuracy.accuracies(right)
    assert {name: figure["accuracy"] for name, figure in table.items()} == {
        "entity_accuracy": 0.75,
        "place_accuracy": 0.75,
        "color_accuracy": 0.75,
        "joint_accuracy": 0.25,
    }
    assert all(figure["n"] == 4 for figure in table.values())


def test_lists_must_match_and_not_be_empty():
    with pytest.raises(ValueError, match="1 images for 2 captions"):
        scene_accuracy.outcomes([fact()], [fact()] * 2, EASY)
    with pytest.raises(UserError, match="too few"):
        scene_accuracy.accuracies(scene_accuracy.outcomes([], [], EASY))


def test_art_nll_counts_only_codes_that_show_art():
    nll = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 9.0]], np.float32)
    art = np.array([[True, True, False, False], [False, False, False, True]])
    assert scene_accuracy.per_document(nll).tolist() == [2.5, 6.0]
    assert scene_accuracy.per_document(nll, art).tolist() == [1.5, 9.0]
    summary = scene_accuracy.nll_summary(nll, art)
    assert summary["image_nll"]["mean"] == 4.25
    assert summary["art_nll"]["mean"] == 5.25 and summary["art_nll"]["n"] == 2


def test_a_nan_outside_the_mask_does_not_spread_and_inside_is_refused():
    nll = np.array([[1.0, np.nan], [2.0, 2.0]])
    assert scene_accuracy.per_document(nll, np.array([[1, 0], [1, 0]], bool)).tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match="image NLL: 1 of 2"):
        scene_accuracy.nll_summary(nll, np.ones((2, 2), bool))


def test_shapes_and_empty_masks_are_refused():
    with pytest.raises(ValueError, match=r"must both be \[B, N\]"):
        scene_accuracy.per_document(np.zeros((2, 3)), np.ones((2, 4), bool))
    with pytest.raises(ValueError, match="document 1 has no code"):
        scene_accuracy.per_document(np.zeros((2, 2)), np.array([[1, 0], [0, 0]], bool))
