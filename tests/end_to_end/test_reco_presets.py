"""RECO's presets are valid configs, and those of public weights name what they still need."""

import pytest

from rag_mm.cli import main
from rag_mm.stages import chain_config


@pytest.mark.parametrize("preset", ["toy", "harder_toy", "tiny"])
def test_every_stage_of_a_preset_has_a_config(preset):
    page = chain_config.load(f"configs/reco.py:{preset}")
    assert list(chain_config.stage_configs(page)) == page["stages"]


def test_presets_of_public_weights_ask_for_documents_and_a_memory(tmp_path, capsys):
    command = ["train", "--config=configs/reco.py:clip_b32", f"--workdir={tmp_path / 'run'}"]
    assert main.main(command) == 2
    message = capsys.readouterr().err
    assert (
        "give --config.document_pairs.documents=... and --config.document_pairs.memory" in message
    )
    assert not (tmp_path / "run").exists()
