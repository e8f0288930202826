"""The concept world: which embeddings retrieve which, and determinism."""

import dataclasses

import numpy as np
import pytest

from rag_mm.worlds import concepts

CONFIG = concepts.ConceptWorld(num_classes=40, num_common=20, num_held_out=8)


@pytest.fixture
def world():
    return concepts.Concepts(CONFIG, seed=0)


def share_found(queries: np.ndarray, rows: np.ndarray) -> float:
    return float(((queries @ rows.T).argmax(1) == np.arange(len(rows))).mean())


def test_every_class_has_a_split_and_a_group(world):
    sizes = [len(world.classes(name)) for name in concepts.SPLITS]
    assert sizes == [20, 12, 8] and len(world.classes(*concepts.SPLITS)) == 40
    assert np.bincount(world.groups).tolist() == [5] * 8


def test_like_finds_like_everywhere_and_texts_find_images_of_common_classes_only(world):
    rng = np.random.default_rng(1)
    for names, meets in ((("common",), True), (("rare_seen", "held_out"), False)):
        ids = world.classes(*names)
        images, more_images = (world.images(ids, rng) for _ in range(2))
        texts, more_texts = (world.texts(ids, rng) for _ in range(2))
        assert share_found(images, more_images) > 0.7 and share_found(texts, more_texts) > 0.7
        assert (share_found(texts, images) > 0.7) is meets


def test_rows_are_unit_and_equal_seeds_give_equal_bits(world):
    ids = np.arange(40)
    drawn = [
        concepts.Concepts(CONFIG, seed).images(ids, np.random.default_rng(0)) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2]) and drawn[0].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(drawn[0], axis=1), 1, atol=1e-6)


def test_wrong_captions_are_of_another_class_of_the_group():
    world = concepts.Concepts(dataclasses.replace(CONFIG, wrong_captions=0.4), seed=0)
    ids = np.repeat(np.arange(40), 200)
    captioned = world.captioned_as(ids, np.random.default_rng(0))
    assert (captioned != ids).mean() == pytest.approx(0.4, abs=0.02)
    np.testing.assert_array_equal(world.groups[captioned], world.groups[ids])


def test_an_offset_parts_the_modalities():
    ids, rng = np.arange(40), np.random.default_rng(0)
    means = []
    for offset in (0.0, 2.0):
        world = concepts.Concepts(dataclasses.replace(CONFIG, modality_offset=offset), seed=0)
        means.append(np.linalg.norm(world.images(ids, rng).mean(0) - world.texts(ids, rng).mean(0)))
    assert means[1] > 3 * means[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 3}, "divides num_classes"),
        ({"num_common": 32}, "at least one each"),
        ({"wrong_captions": 1.5}, "0 to 1"),
        ({"class_spread": 0.0}, "class_spread more than 0"),
    ],
)
def test_worlds_that_cannot_be(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CONFIG, **changes)
