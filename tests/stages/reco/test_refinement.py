"""Retrieval and fusion of RECO: the right column, no self-matches, and exchangeable memories."""

import dataclasses

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.models import reco
from rag_mm.stages.reco import draw_toy_pairs, embed_pairs, refinement, train_fusion
from rag_mm.stages.reco.refinement import Bank, Refiner, SearchSettings, is_refined, mean_fusions
from rag_mm.worlds import concepts

N, DIM = 12, 16


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def bank():
    """A bank whose two columns are independent random embeddings."""
    rng = np.random.default_rng(0)
    return Bank({name: unit(rng.standard_normal((N, DIM))) for name in reco.MODALITIES})


@pytest.mark.parametrize("modality", reco.MODALITIES)
@pytest.mark.parametrize("kind", ["uni", "cross"])
@pytest.mark.parametrize("fuse", ["uni", "cross"])
def test_the_fused_rows_are_those_that_were_found(bank, modality, kind, fuse):
    """An index of one column must return rows of the other one."""
    search = SearchSettings(**{modality: reco.Lookup(kind, fuse)}, num_neighbors=1)
    searched, fused = reco.Lookup(kind, fuse).columns(modality)
    found = search.find(bank, modality, bank.columns[searched])
    assert found.ids[:, 0].tolist() == list(range(N))
    retrieved, neighbor_mask = found.take()
    np.testing.assert_array_equal(retrieved[:, 0], bank.columns[fused])
    assert neighbor_mask.all()


def test_nothing_retrieves_itself_nor_a_near_copy(bank):
    search, own = SearchSettings(num_neighbors=3), np.arange(N)
    queries = bank.columns["image"]
    assert (search.find(bank, "image", queries).ids[:, 0] == own).all()
    masked = search.find(bank, "image", queries, own).ids
    assert not (masked == own[:, None]).any() and (masked >= 0).all()
    far = dataclasses.replace(search, max_similarity=0.95)
    assert not (far.find(bank, "image", queries).ids == own[:, None]).any()


def test_more_neighbors_than_rows_are_missing(bank):
    found = SearchSettings(num_neighbors=N + 3).find(bank, "text", bank.columns["text"][:2])
    retrieved, neighbor_mask = found.take(np.array([1]))
    assert neighbor_mask.sum() == N and retrieved.shape == (1, N + 3, DIM)


def test_as_many_queries_are_fused_as_are_asked_for(bank):
    """Up to the next power of two."""
    sizes = []

    def second(queries, retrieved, neighbor_mask):
        sizes.append(len(queries))
        return retrieved[:, 1]

    for num in (1, 3, 5):
        queries = bank.columns["image"][:num]
        found = SearchSettings(num_neighbors=2).find(bank, "image", queries)
        fused = refinement.fuse(second, queries, found, batch_size=4)
        np.testing.assert_array_equal(fused, found.take()[0][:, 1])
    assert sizes == [1, 4, 4, 1]


def test_retrieval_overrides(bank):
    queries = bank.columns["image"][:4]
    retrieved, _ = (
        SearchSettings(retrieval_override="query", num_neighbors=2)
        .find(bank, "image", queries)
        .take()
    )
    np.testing.assert_array_equal(retrieved, np.repeat(queries[:, None], 2, axis=1))
    drawn = [
        SearchSettings(retrieval_override="random", seed=s).find(bank, "image", queries).ids
        for s in (0, 0, 1)
    ]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def test_a_memory_is_exchanged_without_changing_the_model(bank):
    refiner = Refiner(mean_fusions(), bank, SearchSettings(num_neighbors=2))
    queries = bank.columns["image"][:5]
    before = refiner.refine("image", queries)
    refiner.bank = Bank({name: rows[:1] for name, rows in bank.columns.items()})
    assert np.abs(refiner.refine("image", queries) - before).max() > 0.1
    refiner.bank = bank
    np.testing.assert_array_equal(refiner.refine("image", queries), before)
    assert refiner.refine("image", queries[:0]).shape == (0, DIM)


def test_which_modalities_are_refined():
    chosen = {r: [m for m in reco.MODALITIES if is_refined(m, r)] for r in reco.REFINE}
    assert chosen == {"none": [], "image": ["image"], "text": ["text"], "both": ["image", "text"]}
    with pytest.raises(UserError, match="refine must be one of none, image, text, both"):
        is_refined("image", "all")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_neighbors": 0}, "at least 1"),
        ({"retrieval_override": "oracle"}, "none, query, random"),
    ],
)
def test_invalid_search_settings_are_rejected(changes, says):
    with pytest.raises(ValueError, match=says):
        SearchSettings(**changes)


WORLD = concepts.ConceptWorld(num_classes=40, num_common=20, num_held_out=8, dim=16)
TOY = draw_toy_pairs.ToyPairsStageConfig(0, WORLD, num_train=64, rows_per_class=3, num_test=2)


def test_toy_pairs_keep_held_out_classes_from_training(tmp_path):
    found = draw_toy_pairs.sample_pairs(TOY)
    held_out = np.flatnonzero(found.splits == 2)
    assert not np.isin(found.train.class_ids, held_out).any()
    assert not np.isin(found.seen_memory.class_ids, held_out).any()
    rest = found.memory.class_ids[found.num_seen :]
    assert sorted(set(rest)) == held_out.tolist() and len(rest) == 3 * 8
    embed_pairs.save(tmp_path, found)
    again = embed_pairs.load(tmp_path)
    np.testing.assert_array_equal(again.prompts, found.prompts)
    np.testing.assert_array_equal(again.memory.text, found.memory.text)
    assert again.split_names == found.split_names and again.towers == found.towers


def test_training_retrieves_seen_rows_and_never_itself():
    page = dict(model=dict(num_heads=4), optimizer=dict(), loop=dict(num_steps=1))
    found = draw_toy_pairs.sample_pairs(TOY)
    for in_memory, masked in ((False, True), (True, True), (True, False)):
        config = train_fusion.FusionStageConfig(
            seed=0,
            world={},
            model=page["model"],
            optimizer=train_fusion.optimizer.OptimizerConfig(),
            loop=train_fusion.loop.LoopConfig(num_steps=1),
            train_in_memory=in_memory,
            mask_self=masked,
        )
        ids = train_fusion.find_for_training(config, found)["image"].ids
        own = found.num_seen + np.arange(len(found.train))[:, None]
        assert (ids == own).any() == (in_memory and not masked)
        assert ids.max() < found.num_seen + (len(found.train) if in_memory else 0)
