"""What a finished run retrieves: never the document itself or its twin, and the same for all who ask."""

import dataclasses

import numpy as np
import pytest
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.memory import policy
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages import chain_config
from rag_mm.stages.shared import find_neighbors, world_config


@pytest.fixture(scope="module")
def config():
    page = chain_config.load("configs/quickstart.py:tiny")
    return chain_config.stage_configs(page)["neighbors"]


def test_no_training_document_reads_its_own_facts_or_one_document_twice(tiny_run, config):
    found = files.read_array(tiny_run.workdir / "neighbors" / "train.npy")
    source = config.world.scenes("train", *world_config.SEEN)
    facts = find_neighbors.memory_facts(config.world)
    assert found.dtype == np.int32
    assert found.shape == (len(source), config.captions_per_image + 1, config.num_neighbors)
    for row in range(0, len(source), 7):
        own = source.facts(row)
        assert all(facts[i] != own for i in found[row].ravel() if i >= 0)
        for ids in found[row]:
            present = ids[ids >= 0]
            assert len(set(present.tolist())) == len(present)


def test_no_document_is_too_similar_to_another_chosen_one(tiny_run):
    measured = files.read_json(tiny_run.workdir / "metrics.json")
    bound = measured["neighbors"]["max_similarity"]
    vectors = Memory.open(tiny_run.workdir / "memory").embeddings("mixed")
    found = files.read_array(tiny_run.workdir / "neighbors" / "train.npy").reshape(-1, 2)
    found = found[(found >= 0).all(axis=1)]
    similarities = (vectors[found[:, 0]] * vectors[found[:, 1]]).sum(axis=1)
    assert similarities.max() <= bound + 1e-5


@pytest.mark.parametrize("split", find_neighbors.TEST_SPLITS)
def test_the_test_sets_are_scenes_of_their_split(tiny_run, config, split):
    folder = tiny_run.workdir / "neighbors"
    rows = files.read_array(folder / f"{split}_rows.npy")
    source = config.world.scenes("test", *find_neighbors.TEST_SPLITS[split])
    assert len(rows) == config.num_test and rows.max() < len(source)
    for kind in find_neighbors.QUERIES:
        found = files.read_array(folder / f"{split}_{kind}.npy")
        assert found.shape == (config.num_test, config.num_neighbors)
        assert found.max() < len(find_neighbors.memory_facts(config.world))


def test_by_phrase_asks_what_holds_no_and_as_before(tiny_run, config, tmp_path):
    run = run_folder.open_run(tiny_run.workdir)
    find_neighbors.run(dataclasses.replace(config, split_phrases=True), run, epath.Path(tmp_path))
    assert files.read_json(tmp_path / find_neighbors.POLICY)["split_phrases"]
    source = config.world.scenes("test", *world_config.SEEN)
    rows = files.read_array(tmp_path / "seen_rows.npy")
    whole = np.array([" and " not in source.full_caption(int(row)) for row in rows])
    for name in ("seen_text.npy", "seen_image.npy"):
        folders = tmp_path, tiny_run.workdir / "neighbors"
        found, before = (files.read_array(folder / name) for folder in folders)
        np.testing.assert_array_equal(found[whole], before[whole])
    assert files.read_array(tmp_path / "train.npy").shape == (
        files.read_array(tiny_run.workdir / "neighbors" / "train.npy").shape
    )


def test_facts_tell_rows_of_the_memory_apart(tiny_run, config):
    """Ids say what a row shows: LEVEL-CLASS-CONFIGURATION."""
    memory = Memory.open(tiny_run.workdir / "memory")
    facts = find_neighbors.memory_facts(config.world)
    assert [shown.entities[0].class_id for shown in facts] == [
        int(name.split("-")[1]) for name in memory.ids
    ]
    assert len({policy.fact_key(repr(shown)) for shown in facts}) == len(facts)


def test_without_held_out_rows_only_seen_classes_are_found(tiny_run, config):
    found = files.read_array(tiny_run.workdir / "neighbors" / "held_out_text_of_seen.npy")
    seen = set(config.world.classes(*world_config.SEEN).tolist())
    facts = find_neighbors.memory_facts(config.world)
    assert all(facts[i].entities[0].class_id in seen for i in found.ravel() if i >= 0)


def test_the_retrieval_check_stops_a_chain_whose_neighbors_show_the_wrong_classes(config):
    strict = dataclasses.replace(config, min_same_class=0.9)
    find_neighbors._check_retrieval(strict, 0.9)
    with pytest.raises(UserError, match=r"Retrieval check failed: 85.0 % .* is 90 %"):
        find_neighbors._check_retrieval(strict, 0.85)
    find_neighbors._check_retrieval(config, 0.0)
    with pytest.raises(ValueError, match="min_same_class"):
        dataclasses.replace(config, min_same_class=1.5)
