"""The copy probe on the command line: what it writes, and how it stops if nothing is copied."""

import numpy as np
import pytest

from rag_mm.cli import main
from rag_mm.core import files

COMMAND = ["train", "--config=configs/copy_probe.py:tiny"]


@pytest.mark.slow
def test_the_probe_measures_each_number_of_documents_and_can_stop_early(tmp_path, capsys):
    run = tmp_path / "run"
    assert main.main([*COMMAND, f"--workdir={run}"]) == 0
    measured = files.read_json(run / "metrics.json")["copy_probe"]
    values = files.read_json(run / "copy_probe" / "per_document.json")["held_out"]
    assert set(values) == set(measured["art_nll"]) == {"docs0", "docs1", "docs2"}
    for name, figures in values.items():
        assert len(figures["art_nll"]) == measured["art_nll"][name]["n"] == 16
        assert np.mean(figures["art_top1"]) == pytest.approx(measured["art_top1"][name]["mean"])
    log = (run / "copy_probe" / "log.jsonl").read_text()
    assert log.count("art_top1_docs1") == 2  # At both checkpoints.

    # No model gains 0.9 in 40 steps: the stage stops and leaves nothing behind.
    capsys.readouterr()
    args = [f"--workdir={run}", "--overwrite", "--config.copy_probe.min_gain=0.9"]
    assert main.main([*COMMAND, *args]) == 2
    assert "Copying has not started at step 20 of 40" in capsys.readouterr().err
    assert not (run / "copy_probe").exists()


@pytest.mark.slow
def test_copying_is_learned_in_150_steps(tmp_path):
    """The whole path of a document into the sequence and of its art into the prediction has to work."""
    run = tmp_path / "run"
    changes = {
        "world.class_share": 0.4,
        "copy_probe.loop.num_steps": 150,
        "copy_probe.loop.log_every": 50,
        "copy_probe.loop.checkpoint_every": 150,
        "copy_probe.optimizer.warmup_steps": 20,
        "copy_probe.min_gain": 0.0,
        "copy_probe.num_test": 64,
    }
    options = [f"--config.{key}={value}" for key, value in changes.items()]
    command = ["train", "--config=configs/copy_probe.py:quick", f"--workdir={run}", *options]
    assert main.main(command) == 0
    top1 = files.read_json(run / "metrics.json")["copy_probe"]["art_top1"]
    assert top1["docs1"]["mean"] > top1["docs0"]["mean"] + 0.1


@pytest.mark.slow
def test_packed_rows_train_by_command(tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--config.copy_probe.sequences.layout=packed"]
    assert main.main([*COMMAND, f"--workdir={run}", *options]) == 2
    assert "max_seq_len is 0; give max_seq_len" in capsys.readouterr().err
    options += ["--config.copy_probe.sequences.max_seq_len=512"]
    assert main.main([*COMMAND, f"--workdir={run}", *options]) == 0
    figures = files.read_json(run / "metrics.json")["copy_probe"]
    assert np.isfinite(figures["art_nll"]["docs2"]["mean"]) and figures["tokens"] == 40 * 8 * 512
