"""NLL of captions against a run that learned texts alone: scene by scene, and of the same scenes only."""

import numpy as np
import pytest
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.eval import statistics
from rag_mm.stages.emu import measure_emu, text_control
from rag_mm.stages.shared import world_config
from rag_mm.stages.stage import PER_DOCUMENT

WORLD = world_config.EmojiWorld(class_share=0.05, seed=3)
THEIRS = {split: {"none": {"caption_nll": [1.0, 2.0, 3.0]}} for split in ("held_out", "seen")}


@pytest.fixture
def other(tmp_path):
    """A finished run with three scenes a split."""
    run = run_folder.Run(epath.Path(tmp_path / "other"))

    def write(run, folder):
        files.write_json(folder / PER_DOCUMENT, THEIRS)
        for split in THEIRS:
            files.write_json(folder / f"{split}_captions.json", {"wanted": ["a", "b", split]})
        return {}

    run_folder.run_stage(run, text_control.STAGE, {}, (), write)
    return str(tmp_path / "other")


def test_ratios_are_of_means_over_the_same_scenes(other, tmp_path):
    mine = epath.Path(tmp_path)
    for split in THEIRS:
        files.write_json(mine / f"{split}_captions.json", {"wanted": ["a", "b", split]})
    ours = {"none": {"caption_nll": [1.5, 2.0, 3.1], "exact": [0.0] * 3}, "encoded": {"r2": [1.0]}}
    found = measure_emu._to_text_alone(other, mine, {"held_out": ours, "seen": THEIRS["seen"]})
    assert found["held_out"]["none"]["mean"] == pytest.approx(6.6 / 6)
    assert set(found["held_out"]) == {"none"}
    assert found["seen"]["none"] == {"mean": 1.0, "ci95": 0.0, "n": 3}


def test_a_run_on_other_scenes_is_refused(other):
    with pytest.raises(UserError, match="measured on other scenes; give a run of the same seed"):
        text_control.read(other, {"seen": ["a", "b", "held_out"]}, "captions.json")


def test_another_run_is_another_config_and_must_be_finished(other, tmp_path):
    make = measure_emu.EmuFiguresStageConfig
    config = make(0, WORLD, text_alone=other)
    assert config.text_alone_fingerprint and not make(0, WORLD).text_alone_fingerprint
    with pytest.raises(UserError, match="has no finished emu_figures; give a run of the preset"):
        make(0, WORLD, text_alone=str(tmp_path / "none"))


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        theirs = rng.gamma(4.0, 0.25, 100)
        ours = 1.2 * theirs + rng.normal(0, 0.3, 100)
        found = statistics.ratio_of_means(ours, theirs)
        hits += abs(found["mean"] - 1.2) <= found["ci95"]
    assert 0.92 <= hits / 400 <= 0.98
