"""Scenes as labeled images."""

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import emoji_scenes
from rag_mm.worlds.emoji.labeled_scenes import LabeledScenes


def test_a_scene_has_the_class_of_its_entity():
    scenes, documents = (
        LabeledScenes("easy/test/test"),
        emoji_scenes.open_documents("easy/test/test"),
    )
    assert len(set(scenes.class_names)) == len(scenes.class_names) == 132
    read = list(scenes.read())
    assert len(read) == len(documents) and scenes.rejects == []
    assert np.bincount([c for _, c in read]).tolist() == [4] * 132
    for row in (0, 100, 527):
        pixels, class_id = read[row]
        np.testing.assert_array_equal(pixels, documents[row].image)
        names = documents[row].text
        assert any(word in names for word in scenes.class_names[class_id].split())


def test_an_unknown_level_is_a_user_error():
    with pytest.raises(UserError, match="no level 'hard'"):
        LabeledScenes("hard/test/test")
