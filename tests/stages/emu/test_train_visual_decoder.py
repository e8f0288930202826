"""Training data of visual decoders: every condition of every pair once an epoch, beside the pair's image."""

import dataclasses

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.models.emu import visual_decoder
from rag_mm.stages import chain_config
from rag_mm.stages.emu import album, prepare_data, store_rollouts, train_visual_decoder
from rag_mm.stages.emu.training_documents import TrainingDocuments

PAGE = {
    "seed": 0,
    "world": {"class_share": 0.05},
    "stages": ("emu_data", "emu", "rollouts", "visual_decoder", "visual_control"),
    "visual_decoder": {
        "optimizer": {"learning_rate": 1e-3},
        "loop": {"num_steps": 20},
        "model": {"drop_rate": 0.2},
    },
}


def _stage_configs(**changes):
    """Configs of both decoders, `changes` being values of visual_decoder."""
    section = PAGE["visual_decoder"] | changes
    stages = ("visual_decoder", "visual_control")
    return chain_config.stage_configs(PAGE | {"stages": stages, "visual_decoder": section})


class StandIn:
    """Codes that are a picture's number, as `arrays_of` gives it."""

    def codes(self, seen):
        return np.repeat(np.asarray(seen, np.float32)[:, None], 2, axis=1)


@pytest.fixture
def documents():
    """Four pairs, whose pictures are numbered 3, 2, 1, 0 and show their number."""
    made = album.Album()
    for i in range(4):
        made.add(("picture", i), lambda i=i: np.full((2, 2, 3), i, np.uint8))
    pairs = [(f"caption {i}", 3 - i) for i in range(4)]
    return TrainingDocuments(made, pairs, [], [], [], [])


def _arrays(first):
    """Codes [2, 3] of four captions: `first`, `first` + 1, .."""
    return album.PictureArrays((np.full((4, 2, 3), np.arange(first, first + 4)[:, None, None]),))


def _epoch(config, documents, monkeypatch):
    stored = store_rollouts.StoredRollouts(
        {"none": _arrays(10), "retrieved": _arrays(20)}, np.zeros((2, 3), np.float32)
    )
    pictures = album.PictureArrays((np.full((4, 3), np.arange(4)[:, None], np.float16),))
    monkeypatch.setattr(prepare_data, "load_pictures", lambda run, numbered: pictures)
    take, sample, count = train_visual_decoder._training_data(
        config, None, documents, StandIn(), stored
    )
    batch = take(np.arange(count))
    assert batch["images"].dtype == np.uint8
    shown, given = batch["images"][:, 0, 0, 0].tolist(), batch["condition"][:, 0, 0].tolist()
    assert len(sample) == count
    return list(zip(shown, given, strict=True))


def test_an_epoch_has_both_rollouts_of_every_pair(documents, monkeypatch):
    epoch = _epoch(_stage_configs()["visual_decoder"], documents, monkeypatch)
    assert epoch == [(3, 10), (3, 20), (2, 11), (2, 21), (1, 12), (1, 22), (0, 13), (0, 23)]


def test_the_control_has_the_same_images_with_their_own_codes(documents, monkeypatch):
    epoch = _epoch(_stage_configs()["visual_control"], documents, monkeypatch)
    assert epoch == [(i, i) for i in (3, 3, 2, 2, 1, 1, 0, 0)]


def test_the_control_differs_by_its_condition_alone():
    found = _stage_configs(batch_size=16)
    ours, control = found["visual_decoder"], found["visual_control"]
    assert (ours.condition, control.condition) == ("rollouts", "embeddings")
    assert dataclasses.replace(control, condition="rollouts") == ours
    assert _stage_configs(condition="embeddings")["visual_control"].condition == "rollouts"


def test_the_network_must_draw_images_of_the_worlds_size():
    with pytest.raises(UserError, match="image_size is 16, but the world's images have 32 pixels"):
        _stage_configs(model={"dit": {"image_size": 16}})
    with pytest.raises(UserError, match="patch_size=5 does not divide"):
        _stage_configs(model={"dit": {"patch_size": 5}})


def test_what_is_fitted_is_not_trained():
    fitted = [
        path
        for path in ("null", "statistics/mean", "network/output/kernel")
        if visual_decoder.is_fitted(path)
    ]
    assert fitted == ["null", "statistics/mean"]


def test_a_mesh_that_splits_parameters_is_refused():
    with pytest.raises(UserError, match="1 along tensor"):
        _stage_configs(scale={"mesh": (1, 1, 2)})
