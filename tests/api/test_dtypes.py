"""A checkpoint in any dtype generates on a CPU, and `rag_mm.load` changes the dtype of one that is stored."""

import json
import pathlib
import sys

import numpy as np
import PIL.Image
import pytest
from etils import epath

import rag_mm
from rag_mm.api import importing
from rag_mm.cli import main
from rag_mm.core import run_folder
from rag_mm.core.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny

PROMPT = [[1, 5, 9]]


@pytest.fixture(scope="module")
def half_run(tmp_path_factory):
    """A tiny LLaMA in float16, Llama 2's own dtype."""
    place = tmp_path_factory.mktemp("half")
    folder = tiny.write(place / "theirs", "llama", np.float16)
    importing.import_checkpoint("llama", folder, place / "run")
    return place / "run"


def test_float16_generates(half_run):
    model = rag_mm.load(half_run)
    assert model.config.dtype == "float16"
    (tokens,) = model.generate(PROMPT, num_tokens=4).tokens
    assert len(tokens) == 4
    (longer,) = model.generate([[*PROMPT[0], *tokens[:2]]], num_tokens=2).tokens
    assert longer == tokens[2:]


def test_load_changes_the_dtype(half_run):
    half, whole = rag_mm.load(half_run), rag_mm.load(half_run, dtype="float32")
    assert whole.config.dtype == "float32"
    np.testing.assert_allclose(half.logits(PROMPT), whole.logits(PROMPT), atol=0.02)


def test_a_dtype_that_nothing_can_have_is_one_sentence(half_run, tmp_path):
    with pytest.raises(UserError, match="dtype=int7 is not supported; give float32"):
        rag_mm.load(half_run, dtype="int7")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="'float32' is for imported checkpoints"):
        rag_mm.load(tmp_path, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps({importing.IMPORTED: "clip"}))
    with pytest.raises(UserError, match="'float32' is for language models"):
        rag_mm.load(tmp_path, dtype="float32")


def test_a_stage_is_for_runs_that_trained_a_decoder(half_run, tmp_path, capsys):
    says = "is for runs that trained a decoder"
    with pytest.raises(UserError, match=says):
        rag_mm.load(half_run, stage="sft")
    (tmp_path / "config.json").write_text(json.dumps({}))
    run_folder.run_stage(
        run_folder.Run(epath.Path(tmp_path)), "emu", {}, (), lambda run, folder: {}
    )
    with pytest.raises(UserError, match=says):
        rag_mm.load(tmp_path, stage="sft")
    PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    words = [f"--workdir={tmp_path}", f"--image={tmp_path / 'a.png'}", "--stage=sft"]
    assert main.main(["caption", *words]) == 2
    assert says in capsys.readouterr().err
