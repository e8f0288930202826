"""Documents before test scenes: where a caption is to be written, it is not what they are retrieved by."""

import numpy as np
import pytest
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.stages.emu import tested_scenes
from rag_mm.stages.emu.album import Album
from rag_mm.stages.shared import world_config

WORLD = world_config.EmojiWorld(class_share=0.05, seed=3)


def test_captions_are_written_after_documents_that_their_image_retrieved(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    hits = {"rows": np.array([0, 3]), "text": np.array([[0], [1]]), "image": np.array([[2], [-1]])}
    for name, values in hits.items():
        files.write_array(folder / f"seen_{name}.npy", values)
    monkeypatch.setattr(run_folder.Run, "finished_stage", lambda run, name: folder)
    run, album = run_folder.Run(folder), Album()
    tested = tested_scenes.open_scenes(WORLD, run, album, "seen", 2, 0)
    memory = WORLD.scenes("memory", *world_config.SEEN)
    assert [parts[0] for parts in tested.before("retrieved")] == [memory[i].text for i in (0, 1)]
    ((number, caption), nothing) = tested.before_images("retrieved")
    assert caption == memory[2].text and nothing == ()
    np.testing.assert_array_equal(album.pixels(number), memory.image(2))
    for name in ("none", "oracle", "wrong"):
        expected = [parts[::-1] for parts in tested.before(name)]
        assert tested.before_images(name) == expected


@pytest.mark.parametrize(("name", "is_own"), [("oracle", True), ("wrong", False)])
def test_documents_given_are_of_the_class_or_of_another(tmp_path, monkeypatch, name, is_own):
    folder = epath.Path(tmp_path)
    for query in ("text", "image"):
        files.write_array(folder / f"seen_{query}.npy", np.full((40, 1), -1))
    files.write_array(folder / "seen_rows.npy", np.arange(40))
    monkeypatch.setattr(run_folder.Run, "finished_stage", lambda run, name: folder)
    tested = tested_scenes.open_scenes(WORLD, run_folder.Run(folder), Album(), "seen", 40, 0)
    memory = WORLD.scenes("memory", *world_config.SEEN)
    class_of = {memory[i].text: memory.class_ids[i] for i in range(len(memory))}
    own = tested.scenes.class_ids[tested.rows]
    found = np.array([class_of[parts[0]] for parts in tested.before(name)])
    assert ((found == own) == is_own).all()
    assert tested.before("retrieved") == [()] * 40


def test_candidates_at_levels_of_two_entities_show_other_classes_alike(tmp_path, monkeypatch):
    world = world_config.EmojiWorld(("pairs", "free"), class_share=0.05, seed=3)
    folder = epath.Path(tmp_path)
    for query in ("text", "image"):
        files.write_array(folder / f"held_out_{query}.npy", np.full((20, 1), -1))
    files.write_array(folder / "held_out_rows.npy", np.arange(20))
    monkeypatch.setattr(run_folder.Run, "finished_stage", lambda run, name: folder)
    album = Album()
    tested = tested_scenes.open_scenes(world, run_folder.Run(folder), album, "held_out", 20, 0)
    assert {len(facts.entities) for facts in tested.facts} == {1, 2}
    rng = np.random.default_rng(0)
    own = tested_scenes.own_candidates(album, tested, world.class_share)
    same = tested_scenes.same_candidates(album, tested, 32, rng)
    facts_of = {number: key[1] for key, number in album._numbers.items()}
    num_classes = len(np.unique(tested.scenes.class_ids))
    assert own.shape == (20, 32) and same.shape == (20, num_classes - 1)
    for facts, mine, others in zip(tested.facts, own.tolist(), same.tolist(), strict=True):
        assert facts_of[mine[0]] == facts_of[others[0]] == facts
        assert len(set(mine)) == 32 and len(set(others)) == len(others)
        first = facts.entities[0].class_id
        assert all(facts_of[each].entities[0].class_id == first for each in mine)
        for each in others[1:]:
            shown = facts_of[each]
            assert shown.color == facts.color and shown.entities[1:] == facts.entities[1:]
            classes = {entity.class_id for entity in shown.entities}
            assert first not in classes and len(classes) == len(facts.entities)
