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
from rag_mm.stages.shared import find_neighbors, train_tokenizer, world_config


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


@pytest.fixture(scope="module")
def all_codes(tiny_run):
    return Memory.open(tiny_run.workdir / "memory").codes


def equal_shares(codes, ids):
    """Of pairs of neighbors, int [..., 2], the share of equal codes of each; missing ones are left out."""
    pairs = ids.reshape(-1, 2)
    pairs = pairs[(pairs >= 0).all(axis=1)]
    return (codes[pairs[:, 0]] == codes[pairs[:, 1]]).mean(axis=1)


def test_no_two_neighbors_show_the_same_art_at_the_same_place(
    tiny_run, config, all_codes, tmp_path
):
    found = files.read_array(tiny_run.workdir / "neighbors" / "train.npy")
    assert config.max_equal_codes == 0.5 and equal_shares(all_codes, found).max() <= 0.5
    measured = files.read_json(tiny_run.workdir / "metrics.json")["neighbors"]
    assert measured["max_equal_codes"] == 0.5 and measured["max_similarity"] is None
    by_text = equal_shares(all_codes, found[:, 0])
    assert measured["median_equal_codes_of_two"] == pytest.approx(np.median(by_text))
    # The rule binds: without it such pairs are found.
    without = dataclasses.replace(config, max_equal_codes=1.0)
    find_neighbors.run(without, run_folder.open_run(tiny_run.workdir), epath.Path(tmp_path))
    free = files.read_array(tmp_path / "train.npy")
    assert (equal_shares(all_codes, free) > 0.5).mean() > 0.01


def test_what_an_image_finds_does_not_show_it_again(tiny_run, config, all_codes):
    found = files.read_array(tiny_run.workdir / "neighbors" / "train.npy")[:, -1]
    source = config.world.scenes("train", *world_config.SEEN)
    tokenizer = train_tokenizer.load_tokenizer(tiny_run.workdir)
    own = tokenizer.encode(world_config.images(source))
    shares = (all_codes[found] == own[:, None]).mean(axis=-1)
    assert shares[found >= 0].max() <= 0.5


SPLITS = find_neighbors.TEST_SPLITS | find_neighbors.TUNE_SPLITS


@pytest.mark.parametrize("split", SPLITS)
def test_the_test_sets_are_scenes_of_their_split(tiny_run, config, split):
    folder = tiny_run.workdir / "neighbors"
    rows = files.read_array(folder / f"{split}_rows.npy")
    source = config.world.scenes("test", *SPLITS[split])
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


def test_tables_and_checks_read_other_classes(tiny_run, config, tmp_path):
    """The check fails on tune classes although every neighbor of a test class were right."""
    classes = {split: set(config.world.classes(*names)) for split, names in SPLITS.items()}
    assert not classes["tune"] & classes["held_out"]
    assert classes["tune"] | classes["held_out"] == set(config.world.classes("held_out"))
    measured = files.read_json(tiny_run.workdir / "metrics.json")
    same_class = measured["neighbors"]["same_class"]
    assert measured["retriever"]["same_class_at_2"] == same_class["held_out"]
    bound = same_class["tune"] + 0.01
    strict = dataclasses.replace(config, min_same_class=bound)
    with pytest.raises(
        UserError, match=f"Retrieval check failed: {100 * same_class['tune']:.1f} %"
    ):
        find_neighbors.run(strict, run_folder.open_run(tiny_run.workdir), epath.Path(tmp_path))


def test_the_retrieval_check_stops_a_chain_whose_neighbors_show_the_wrong_classes(config):
    strict = dataclasses.replace(config, min_same_class=0.9)
    find_neighbors._check_retrieval(strict, 0.9)
    with pytest.raises(UserError, match=r"Retrieval check failed: 85.0 % .* is 90 %"):
        find_neighbors._check_retrieval(strict, 0.85)
    find_neighbors._check_retrieval(config, 0.0)
    with pytest.raises(ValueError, match="min_same_class"):
        dataclasses.replace(config, min_same_class=1.5)
