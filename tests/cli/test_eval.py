"""`rag-mm eval`: a user error is one sentence and exit code 2."""

import numpy as np
import PIL.Image
import pytest

from rag_mm.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--suite=visdial --workdir=run --images=x", "suite visdial reads --documents"),
        ("--suite=visdial --workdir=run --documents=visdial:pics", "is for runs of Emu"),
        (
            "--suite=vqa --workdir=run --documents=vqav2:pics --shots=2",
            "--shots is for runs of Emu",
        ),
        ("--suite=caption --workdir=run --images=x", "suite caption reads --documents"),
        (
            "--suite=fewshot --workdir=run --documents=x",
            "suite fewshot reads --images or --dataset",
        ),
        ("--suite=vqa --workdir=run --documents=x", "'x' is not LAYOUT:PATH; layouts are"),
        ("--suite=vqa --workdir=run --documents=vqav2:none", "none does not exist"),
        ("--suite=vqa --workdir=run --documents=coco-captions:pics", "give vqav2"),
        ("--suite=edit --workdir=run --documents=scenes:easy", "does not name scenes"),
        ("--suite=vqa --workdir=run --documents=vqav2:pics", "run is not a run"),
        ("--suite=vqa --workdir=run --documents=vqav2:pics --limit=1", "limit is 1"),
        ("--suite=vqa --workdir=run --documents=vqav2:pics --ways=2", "option of --suite=fewshot"),
        ("--suite=fewshot --workdir=run --images=x", "not a folder of class folders"),
        ("--suite=fewshot --workdir=run --images=pics", "run is not a run"),
        ("--suite=zeroshot --workdir=run", "arguments --images --dataset --documents is required"),
        ("--suite=zeroshot --workdir=run --images=nothing", "not a folder of class folders"),
        ("--suite=zeroshot --workdir=run --images=. --refine=all", "invalid choice: 'all'"),
        ("--suite=zeroshot --workdir=run --images=pics", "run is not a run"),
        ("--suite=zeroshot --workdir=run --images=pics -k 0", "-k is 0"),
        (
            "--suite=zeroshot --workdir=run --images=pics --max-calls=3",
            "--max-calls is an option of --suite=fewshot",
        ),
    ],
)
def test_a_user_error_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics" / "apple").mkdir(parents=True)
    PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "pics" / "apple" / "0.png")
    assert main.main(["eval", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
