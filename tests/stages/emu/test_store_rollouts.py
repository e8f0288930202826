"""Rollouts of all captions, alone and after the document that each retrieves, in files that are kept."""

import numpy as np
import pytest
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.stages.emu import album, prepare_data, saved_emu, store_rollouts
from rag_mm.stages.emu.prepare_data import EmuDataStageConfig
from rag_mm.stages.emu.training_documents import TrainingDocuments
from rag_mm.stages.shared import world_config

N, R = 2, 3
DOCUMENTS = TrainingDocuments(
    album.Album(),
    pairs=[("a", 0), ("bb", 1), ("ccc", 2)],
    memory=[("dddd", 9), ("eeeee", 5)],
    stories=[],
    clips=[],
    documents=[],
)
# Of the second caption nothing is retrieved; the image's neighbors are not those of a caption.
NEIGHBORS = np.array([[[1], [0]], [[-1], [0]], [[0], [1]]], np.int32)
# In files of two, as the fixture sets.
PICTURES = album.PictureArrays(
    tuple(np.full((2, R), [[i], [i + 1]], np.float16) for i in range(0, 10, 2))
)


class StandIn:
    """Rollouts that tell what was in the prompt: letters in slot 0, pictures in slot 1."""

    def __init__(self):
        self.config = saved_emu.EmuConfig.tiny()

    def codes(self, seen):
        return np.repeat(np.asarray(seen, np.float32)[:, None], N, axis=1)

    def vectors(self, codes):
        return codes * 100

    def roll_out(self, prompts, vectors):
        made = np.zeros((len(prompts), N, R), np.float32)
        for own, parts in zip(made, prompts, strict=True):
            for part in parts:
                if isinstance(part, str):
                    own[0] += len(part)
                else:
                    own[1] += vectors[part, 0]
        return made


@pytest.fixture
def run_stage(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    files.write_array(folder / "train.npy", NEIGHBORS)
    monkeypatch.setattr(album, "PER_FILE", 2)
    monkeypatch.setattr(run_folder.Run, "finished_stage", lambda run, name: folder)
    monkeypatch.setattr(EmuDataStageConfig, "collect", lambda config, run: DOCUMENTS)
    monkeypatch.setattr(saved_emu, "load", lambda folder: StandIn())
    monkeypatch.setattr(prepare_data, "load_pictures", lambda run, numbered: PICTURES)
    run, world = run_folder.Run(folder), world_config.EmojiWorld(class_share=0.05, seed=0)
    data = EmuDataStageConfig(0, world)

    def call(**changes):
        config = store_rollouts.RolloutsStageConfig(0, world, data, **changes)
        return store_rollouts.run(config, run, folder), store_rollouts.open_rollouts(run)

    return call


def test_captions_are_rolled_out_alone_and_after_what_they_retrieve(run_stage):
    counts, stored = run_stage()
    assert counts == {"captions": 3, "after_documents": 2}
    numbers = np.arange(3)
    alone, after = (stored.by_documents[name].take(numbers) for name in ("none", "retrieved"))
    assert alone.dtype == np.float16 and alone.shape == (3, N, R)
    assert alone[:, :, 0].tolist() == [[1, 0], [2, 0], [3, 0]]
    assert after[:, :, 0].tolist() == [[1 + 5, 500], [2, 0], [3 + 4, 900]]
    assert not stored.null.any()


def test_without_documents_neighbors_are_not_read(run_stage):
    counts, stored = run_stage(has_documents=False)
    assert counts["after_documents"] == 0 and list(stored.by_documents) == ["none"]
    config = store_rollouts.RolloutsStageConfig
    world = world_config.EmojiWorld()
    data = EmuDataStageConfig(0, world)
    assert store_rollouts.inputs(config(0, world, data)) == ("neighbors",)
    assert store_rollouts.inputs(config(0, world, data, has_documents=False)) == ()


def test_files_that_are_there_are_kept(run_stage, tmp_path):
    files.write_array(
        epath.Path(tmp_path) / "none" / "00001.npy", np.full((1, N, R), 7, np.float16)
    )
    stored = run_stage()[1].by_documents["none"].take(np.arange(3))
    assert stored[:, 0, 0].tolist() == [1, 2, 7]
