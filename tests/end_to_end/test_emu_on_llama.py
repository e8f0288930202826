"""An Emu that starts from an imported LLaMA, through the commands: its rows, its tokenizer, a caption."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

import rag_mm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "stages" / "emu"))
import tiny_llama

# 50 seconds of processor time.
pytestmark = pytest.mark.slow


def _rag_mm(*args, cwd):
    command = [sys.executable, "-m", "rag_mm", *args]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_training_starts_from_an_imported_llama(tiny_run, tmp_path):
    tiny_llama.write(tmp_path / "theirs")
    _rag_mm("import", "llama", "theirs", "--out=llama", cwd=tmp_path)
    shared = ["train", "--config=configs/emu.py:llama_tiny", "--workdir=run", "--reuse"]
    shared += [str(tiny_run.workdir), "--config.emu_data.language_model=llama"]
    loop = {"num_steps": 2, "log_every": 1, "checkpoint_every": 2}
    shared += [f"--config.emu.loop.{name}={value}" for name, value in loop.items()]
    stages = "('tokenizer', 'retriever', 'memory', 'neighbors', 'emu_data', 'emu')"
    _rag_mm(*shared, f"--config.stages={stages}", cwd=tmp_path)
    theirs = rag_mm.load(str(tmp_path / "llama"))
    session = rag_mm.load(str(tmp_path / "run"))
    size, ids = theirs.config.vocab_size, session.emu.config.ids
    assert (ids.begin, ids.end, ids.pad, ids.slot) == (1, 2, size, size + 3)
    for name in ("embedding", "head"):
        before = np.asarray(theirs.params[name]["table"])
        after = np.asarray(session.emu.model.params["decoder"][name]["table"])
        assert after.shape == (size + 6, 32)
        # Two small steps from the imported rows, and from their mean.
        np.testing.assert_allclose(after[:size], before, atol=1e-4)
        np.testing.assert_allclose(after[size:], np.tile(before.mean(0), (6, 1)), atol=1e-4)
        assert (after != np.concatenate([before, after[size:]])).any()
    kernel = theirs.params["stack"]["blocks"]["mlp"]["up"]["kernel"]
    moved = session.emu.model.params["decoder"]["stack"]["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(moved, kernel, atol=1e-4)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert len(session.caption(image, num=2, num_tokens=4).captions) == 2
