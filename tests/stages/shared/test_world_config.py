"""The world of a run: which classes it shows, and which scenes are looked at."""

import dataclasses

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.stages import chain_config
from rag_mm.stages.shared import world_config
from rag_mm.worlds.emoji import class_splits

SMALL = world_config.EmojiWorld(class_share=0.01)


def test_a_share_is_taken_of_every_split():
    whole = world_config.EmojiWorld()
    every = np.arange(len(class_splits.split_of()))
    np.testing.assert_array_equal(np.sort(whole.classes(*class_splits.SPLITS)), every)
    sizes = [len(SMALL.classes(name)) for name in class_splits.SPLITS]
    assert sizes == [
        max(3, round(len(class_splits.classes(name)) / 100)) for name in class_splits.SPLITS
    ]
    assert set(SMALL.classes("held_out")) <= set(class_splits.classes("held_out"))


def test_partners_are_kept_classes_too():
    world = world_config.EmojiWorld(levels=("pairs",), class_share=0.05)
    for split in class_splits.SPLITS:
        source = world.scenes("memory", split)
        shown = {e.class_id for i in range(len(source)) for e in source.facts(i).entities}
        assert shown == set(world.classes(split))


def test_seen_and_held_out_share_no_class():
    assert not set(SMALL.classes(*world_config.SEEN)) & set(SMALL.classes(*world_config.HELD_OUT))


def test_the_worlds_seed_is_the_runs_unless_it_has_its_own():
    page = chain_config.load("configs/quickstart.py:tiny", {"seed": "2"})
    world = chain_config.stage_configs(page)["decoder"].world
    assert world == world_config.EmojiWorld(class_share=0.05, seed=2)
    own = chain_config.override(page, {"world.seed": 0})
    assert chain_config.stage_configs(own)["decoder"].world.seed == 0
    # Other classes are held out, and what is the same class has other captions.
    first = dataclasses.replace(world, seed=0)
    assert set(world.classes("held_out")) != set(first.classes("held_out"))
    with pytest.raises(UserError, match="world: seed is -1"):
        chain_config.stage_configs(chain_config.override(page, {"world.seed": -1}))


def test_pictures_are_those_of_the_documents():
    source = SMALL.scenes("test", "held_out")
    pictures = world_config.images(source, np.array([1, 0]))
    np.testing.assert_array_equal(pictures[1], source[0].image)
    np.testing.assert_array_equal(world_config.images(source)[[1, 0]], pictures)


def test_a_sample_is_sorted_distinct_and_decided_by_the_seed():
    source = SMALL.scenes("test", "common")
    rows = world_config.sample_rows(source, 10, 3)
    assert len(np.unique(rows)) == 10 and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, world_config.sample_rows(source, 10, 3))
    assert not np.array_equal(rows, world_config.sample_rows(source, 10, 4))
    assert len(world_config.sample_rows(source, 10**6, 3)) == len(source)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="class_share"):
        world_config.EmojiWorld(class_share=share)
