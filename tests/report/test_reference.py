"""Reference bands come from finished runs; what was not logged is not plotted."""

import json
import re

import pytest
from PIL import Image

from rag_mm.core import run_folder
from rag_mm.core.errors import UserError
from rag_mm.report import logs, reference

STAGES = ("tokenizer", "decoder")


def make_run(folder, seed, steps=(10, 20, 30), **config):
    """A run of two stages whose logs differ by the seed; art_top1_docs1 is logged at the last step only."""
    run = run_folder.Run(run_folder.epath.Path(folder))
    rows = {
        "tokenizer": [{"step": step, "psnr": 20.0 + step + seed} for step in steps],
        "decoder": [{"step": step, "code_nll": 5.0 - seed, "text_nll": 1.0} for step in steps],
    }
    rows["decoder"][-1]["art_top1_docs1"] = 0.5 + 0.1 * seed

    def write(run, stage_dir):
        lines = [json.dumps(row) + "\n" for row in rows[stage_dir.name]]
        (stage_dir / "log.jsonl").write_text("".join(lines))
        return {}

    for stage in STAGES:
        run_folder.run_stage(run, stage, {}, (), write)
    run.save_config({"stages": STAGES, "seed": seed, "report": {"title": str(seed)}} | config)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / f"run{seed}", seed) for seed in range(3)]


def test_the_file_and_the_plot(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert reference.main([*map(str, runs), f"--out={out}"]) == 0
    assert capsys.readouterr().out.split() == [str(out / "curves.json"), str(out / "curves.png")]
    content = json.loads((out / "curves.json").read_text())
    assert (content["preset"], content["seeds"]) == ("quick", [0, 1, 2])
    assert content["curves"]["tokenizer/psnr"] == {
        "steps": [10, 20, 30],
        "low": [30.0, 40.0, 50.0],
        "mean": [31.0, 41.0, 51.0],
        "high": [32.0, 42.0, 52.0],
    }
    assert content["curves"]["decoder/art_top1_docs1"]["steps"] == [30]
    assert "control/code_nll" not in content["curves"]
    with Image.open(out / "curves.png") as opened:
        opened.load()


def test_a_saved_reference_loads(runs, tmp_path):
    path = tmp_path / "out" / reference.FILE_NAME
    made = reference.gather(runs, "quick")
    reference.save(made, path.parent)
    assert reference.load(str(path)) == made
    assert "3 runs of preset quick that trained normally (seed 0, 1, 2)" in made.note


def test_the_band_of_one_run_has_zero_width(runs):
    made = reference.gather(runs[:1], "quick")
    assert all(band.low == band.high == band.mean for band in made.bands.values())
    assert "one run of preset quick that trained normally (seed 0)" in made.note


def test_without_a_file_there_is_no_band(tmp_path):
    assert reference.load("") is None
    assert reference.load(str(tmp_path / "nothing.json")) is None


GOOD = {"steps": [1], "low": [1.0], "high": [1.0], "mean": [1.0]}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"preset": "quick", "seeds": [0]}',
        json.dumps({"preset": "quick", "seeds": 0, "curves": {}}),
        json.dumps({"preset": "quick", "seeds": [0], "curves": []}),
        json.dumps({"preset": "quick", "seeds": [0], "curves": {"a": GOOD | {"low": [1, 2]}}}),
        json.dumps({"preset": "quick", "seeds": [0], "curves": {"a": GOOD | {"low": [None]}}}),
        json.dumps({"preset": "quick", "seeds": [0], "curves": {"a": GOOD | {"low": [1e999]}}}),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, text):
    path = tmp_path / "curves.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        reference.load(str(path))
    assert "\n" not in str(error.value)


def refusal(capsys, *words):
    assert reference.main([*map(str, words), "--out=out"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is not a run" in refusal(capsys, runs[0], tmp_path / "nothing")
    assert "two runs have seed 0" in refusal(capsys, runs[0], runs[0])
    other = make_run(tmp_path / "other", 7, world={"level": "free"})
    assert (
        "another config than" in refusal(capsys, runs[0], other) and not (tmp_path / "out").exists()
    )
    (runs[1] / "decoder" / "log.jsonl").write_text("")
    assert "'decoder' was edited" in refusal(capsys, runs[0], runs[1])


def test_help_has_an_example_and_a_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        reference.main(["--help"])
    assert ended.value.code == 0 and "example: python -m rag_mm" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        reference.main([])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_report_plots_what_was_logged(runs):
    bands = reference.gather(runs, "quick").bands
    drawn = {(curve.chart, curve.label): curve for curve in logs.read_curves(runs[0], bands)}
    held_out = drawn["Held-out entities for checks: top-1 accuracy of art codes", "1 document"]
    assert (held_out.steps, held_out.values) == ([30], [0.5])
    assert held_out.band == bands["decoder/art_top1_docs1"]
    assert len(drawn) == 4  # No baseline was trained and no code usage logged.
    assert all(curve.band is None for curve in logs.read_curves(runs[0], {}))
