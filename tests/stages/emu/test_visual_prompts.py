"""What visual decoders are measured on: originals are judged right, stories ask for their second image."""

import numpy as np
import pytest

from rag_mm.stages.emu import measure_visual, visual_prompts
from rag_mm.stages.emu.album import Album
from rag_mm.stages.emu.tested_scenes import EncodedPictures
from rag_mm.stages.shared import world_config
from rag_mm.worlds.emoji import scene_stories

WORLD = world_config.EmojiWorld(class_share=0.05, seed=3)


@pytest.fixture(scope="module")
def scenes():
    return WORLD.scenes("test", *world_config.TEST)


@pytest.fixture(scope="module")
def stories(scenes):
    return visual_prompts.open_stories(EncodedPictures(Album(), None, None), scenes, range(4))


def test_originals_are_right_and_other_images_are_not(stories):
    own = stories.wanted.judge(stories.wanted.pixels)
    assert not own["mse"].any() and all(
        own[fact].all() for fact in ("entity", "place", "color", "joint")
    )
    inverted = stories.wanted.judge(255 - stories.wanted.pixels)
    # The error of one value x in 0..1 is (1 - 2x)^2.
    expected = np.square(1 - stories.wanted.pixels / 127.5).mean((1, 2, 3))
    np.testing.assert_allclose(inverted["mse"], expected)
    assert not inverted["joint"].any()


def test_a_story_is_given_up_to_its_second_image(stories, scenes):
    prompts = stories.prompts()
    for i, (parts, facts, level) in enumerate(
        zip(stories.given, stories.wanted.facts, stories.wanted.levels, strict=True)
    ):
        caption, number, sentence = parts
        assert caption == scenes.full_caption(i) and number == stories.first[i]
        assert sentence == scene_stories.tell_step(scenes.facts(i), facts, level)
        assert prompts["story"][i] == parts and prompts["sentence"][i] == (sentence,)
    assert not set(stories.first) & set(stories.second)


def test_every_image_is_blended_with_the_next():
    assert visual_prompts.blends(np.array([4, 7, 9])) == [(4, 7), (7, 9), (9, 4)]


def test_weights_of_guidance_are_names_without_dots():
    assert [measure_visual.guidance_name(each) for each in (1.0, 1.5, 2)] == [
        "guidance_1",
        "guidance_1_5",
        "guidance_2",
    ]
    config = measure_visual.VisualFiguresStageConfig
    assert measure_visual.inputs(config(0, WORLD)) == ("visual_control",)
    assert measure_visual.inputs(config(0, WORLD, has_control=False)) == ()
    with pytest.raises(ValueError, match="none below 0"):
        config(0, WORLD, guidances=(1.0, -1.0))
