"""`rag-mm eval`: a user error is one sentence and exit code 2."""

import numpy as np
import PIL.Image
import pytest

from rag_mm.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--suite=caption --workdir=run --images=x", "invalid choice: 'caption'"),
        ("--suite=fewshot --workdir=run --images=x", "not a folder of class folders"),
        ("--suite=fewshot --workdir=run --images=pics", "run is not a run"),
        ("--suite=zeroshot --workdir=run", "arguments --images --dataset is required"),
        ("--suite=zeroshot --workdir=run --images=nothing", "not a folder of class folders"),
        ("--suite=zeroshot --workdir=run --images=. --refine=all", "invalid choice: 'all'"),
        ("--suite=zeroshot --workdir=run --images=pics", "run is not a run"),
        ("--suite=zeroshot --workdir=run --images=pics -k 0", "-k is 0"),
    ],
)
def test_a_user_error_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics" / "apple").mkdir(parents=True)
    PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "pics" / "apple" / "0.png")
    assert main.main(["eval", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
