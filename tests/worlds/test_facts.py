"""The scorer reads, from pixels alone, the facts that a scene was made from."""

import numpy as np
import pytest

from rag_mm.worlds.emoji import art, facts, scenes, splits
from rag_mm.worlds.emoji.scenes import LEVELS, Entity, Facts, Level

EASY, FREE = LEVELS["easy"], LEVELS["free"]


def accuracy(level, asked, noise=0.0):
    """Shares of facts read right from drawn scenes, with Gaussian noise of this RMS added."""
    images = np.stack([scenes.render(one, level) for one in asked])
    noisy = images + np.random.default_rng(0).normal(0, 255 * noise, images.shape)
    read = facts.Scorer(level).read(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    right = [facts.compare(got, one, level) for got, one in zip(read, asked, strict=True)]
    return {key: np.mean([one[key] for one in right]) for key in right[0]}


def test_originals_of_easy_are_read_right_for_all_classes():
    num_classes = art.load_art().num_classes
    # Neighbouring classes take different configurations, so that all 32 come up.
    asked = [scenes.configurations(EASY, i)[i % 32] for i in range(num_classes)]
    assert accuracy(EASY, asked)["joint"] >= 0.99  # Measured: 1.0.


def test_readings_survive_as_much_noise_as_a_tokenizer_makes():
    ids = range(0, art.load_art().num_classes, 8)
    asked = [scenes.configurations(EASY, i)[i // 8 % 32] for i in ids]
    assert accuracy(EASY, asked, noise=0.067)["joint"] >= 0.99


@pytest.mark.parametrize("num_entities", [1, 2])
def test_originals_of_free_are_read_right(num_entities):
    asked = [
        next(f for f in scenes.configurations(FREE, i)[i % 16 :] if len(f.entities) == num_entities)
        for i in range(0, art.load_art().num_classes, 16)
    ]
    assert accuracy(FREE, asked)["joint"] >= 0.99  # Measured on 7,040 scenes: 1.0.


def test_the_reading_is_the_scene_itself():
    source = scenes.Scenes("free", splits.classes("held_out")[:8], "test")
    read = facts.Scorer(FREE).read(np.stack([source[i].image for i in range(len(source))]))
    for i, got in enumerate(read):
        assert got.color == source.facts(i).color
        assert set(got.entities) == set(source.facts(i).entities)


def test_a_card_of_the_backgrounds_color_does_not_fool_the_color():
    green_square = next(
        i for i, names in enumerate(art.load_art().names) if "green square" in names
    )
    asked = Facts((Entity(green_square, 24, 0, 8),), "red")
    (read,) = facts.Scorer(EASY).read(scenes.render(asked, EASY)[None])
    assert read == asked


def test_compare_asks_for_entity_place_and_color_each_and_together():
    asked = Facts((Entity(1, 24, 0, 0),), "red")
    all_right = {"entity": True, "place": True, "color": True, "joint": True}
    assert facts.compare(asked, asked, EASY) == all_right
    elsewhere = Facts((Entity(1, 24, 0, 8),), "red")
    assert facts.compare(elsewhere, asked, EASY) == {**all_right, "place": False, "joint": False}
    other = Facts((Entity(2, 24, 0, 0),), "blue")
    assert facts.compare(other, asked, EASY) == {
        "entity": False, "place": True, "color": False, "joint": False,
    }  # fmt: skip


def test_compare_knows_no_order_but_which_entity_stands_where():
    one, two = Entity(1, 16, 0, 0), Entity(2, 16, 16, 16)
    asked = Facts((one, two), "red")
    assert facts.compare(Facts((two, one), "red"), asked, FREE)["joint"]
    swapped = Facts((Entity(2, 16, 0, 0), Entity(1, 16, 16, 16)), "red")
    assert facts.compare(swapped, asked, FREE) == {
        "entity": True, "place": True, "color": True, "joint": False,
    }  # fmt: skip
    assert not facts.compare(Facts((one,), "red"), asked, FREE)["entity"]


def test_two_cards_are_refused():
    with pytest.raises(ValueError, match="more than one card"):
        facts.Scorer(Level("two", 32, (16,), 16, True, 2))
