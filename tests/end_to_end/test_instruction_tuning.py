"""A finished decoder is tuned on instructions, whole or by LoRA, measured, and asked by `rag-mm eval`."""

import json

import jax
import numpy as np
import public_instructions
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.core import files
from rag_mm.nn import param_trees
from rag_mm.stages.cm3leon import measure_tasks, measure_tuning, scene_instructions
from rag_mm.stages.ra_cm3 import train_decoder
from rag_mm.stages.shared import train_tokenizer


def leaves_of(workdir, stage):
    image_tokenizer = train_tokenizer.load_tokenizer(workdir)
    generator = train_decoder.load_params(workdir / stage, image_tokenizer)
    return param_trees.leaves_by_path(jax.device_get(generator.params))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_run):
    """A run of `sft_tiny` from the finished tiny one."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    assert main.main(tune(workdir, tiny_run)) == 0
    return workdir


def tune(workdir, run, *more):
    return [
        "train",
        "--config=configs/cm3leon.py:sft_tiny",
        f"--workdir={workdir}",
        f"--reuse={run.workdir}",
        *more,
    ]


def evaluate(workdir, capsys, *arguments):
    capsys.readouterr()
    assert main.main(["eval", f"--workdir={workdir}", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_task_is_measured_before_and_after(tuned, tiny_run):
    metrics = files.read_json(tuned / "metrics.json")["sft"]
    names = {name for name in scene_instructions.TASKS if name != "how_many"}
    assert metrics["tasks"]["untuned"].keys() == metrics["tasks"]["tuned"].keys() == names
    assert metrics["tasks"]["tuned"]["recolor"]["joint"]["n"] == 8
    assert metrics["shares"]["text_to_image"] == pytest.approx(0.2)
    losses = [json.loads(line)["loss"] for line in (tuned / "sft/log.jsonl").open()]
    assert losses[-1] < losses[0]
    before, after = leaves_of(tiny_run.workdir, "decoder"), leaves_of(tuned, "sft")
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    scores = files.read_json(tuned / "sft/per_document.json")["held_out"]["tuned_caption"]
    assert len(scores["right"]) == 8


@pytest.mark.slow
def test_tasks_are_watched_on_tune_classes_while_tuning(tuned):
    lines = [json.loads(line) for line in (tuned / "sft/log.jsonl").open()]
    watched = [line for line in lines if "tune_recolor" in line]
    assert [line["step"] for line in watched] == [10, 20]
    assert all(0 <= line[f"tune_{name}"] <= 1 for line in watched for name in ("caption", "move"))
    assert "<h2>While tuning</h2>" in (tuned / "sft.html").read_text()


@pytest.mark.slow
def test_edits_are_drawn_with_two_conditions(tuned):
    metrics = files.read_json(tuned / "metrics.json")["sft"]
    found = metrics["guidance"]["move"]
    assert set(found) == {f"guided_move_{w}" for w in ("i0_t1", "i1_t1", "i1.5_t1", "i1_t0")}
    assert found["guided_move_i1_t1"] == metrics["tasks"]["tuned"]["move"]
    answers = [
        measure_tuning.read_answers(tuned / "sft", f"guided_move_{weights}")
        for weights in ("i0_t1", "i1_t0")
    ]
    assert answers[0] != answers[1]
    values = files.read_json(tuned / "sft/per_document.json")["held_out"]
    assert values["guided_move_i1_t1"] == values["tuned_move"]


@pytest.mark.slow
def test_what_is_copied_is_measured_before_and_after(tuned):
    metrics = files.read_json(tuned / "metrics.json")["sft"]
    assert set(metrics["over_reliance"]) == {"untuned", "tuned"}
    assert metrics["over_reliance"]["tuned"]["copied_whole"]["n"] == 8
    claims = {each["claim"]: each["is_met"] for each in metrics["claims"]}
    assert claims["recolor is learnt"] is False
    assert sum(name.startswith("A document's") for name in claims) == 3


@pytest.mark.slow
def test_the_page_shows_every_task(tuned):
    text = (tuned / "sft.html").read_text()
    for title in ("Tasks", "Claims", "Edits", "Boxes", "Structures", "Answers", "Text to image"):
        assert f"<h2>{title}</h2>" in text
    assert "change the background to" in text and "image 1.5" in text
    assert text.count("<img") > 100


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(tmp_path, tiny_run, monkeypatch):
    """What has been trained and measured is not done again."""
    score, asked = measure_tasks.TaskScorer.score, []

    def stop_at_the_third(scorer, task, answers):
        asked.append(task.task.name)
        if len(asked) == 3:
            raise RuntimeError("stopped")
        return score(scorer, task, answers)

    monkeypatch.setattr(measure_tasks.TaskScorer, "score", stop_at_the_third)
    tasks = '--config.sft.tasks={"text_to_image": 16, "caption": 16}'
    # The first stops, the second goes on.
    command = tune(tmp_path / "run", tiny_run, tasks, "--config.sft.num_watched=0")
    with pytest.raises(RuntimeError, match="stopped"):
        main.main(command)
    params = leaves_of(tmp_path / "run", "sft")
    assert main.main(command) == 0
    names = ["text_to_image", "caption"]
    assert sorted(asked[:2]) == sorted(asked[3:]) == sorted(names) and asked[2] == asked[3]
    again = leaves_of(tmp_path / "run", "sft")
    assert all(np.array_equal(params[name], again[name]) for name in params)


@pytest.mark.slow
def test_lora_changes_its_targets_alone(tmp_path, tiny_run):
    lora = '--config.sft.lora={"rank": 2, "targets": ["q", "down"]}'
    workdir = tmp_path / "run"
    assert main.main(tune(workdir, tiny_run, lora, "--config.sft.num_test=0")) == 0
    before, after = leaves_of(tiny_run.workdir, "decoder"), leaves_of(workdir, "sft")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"stack/blocks/attention/q/kernel", "stack/blocks/mlp/down/kernel"}
    assert "tasks" not in files.read_json(workdir / "metrics.json")["sft"]
    assert "Nothing was measured" in (workdir / "sft.html").read_text()
    assert rag_mm.load(workdir, stage="sft").generate("a red apple", num=1)


@pytest.mark.slow
def test_suites_ask_the_tuned_decoder(tuned, tmp_path, capsys):
    vqa = public_instructions.questions(tmp_path / "vqa")
    path = vqa / "v2_OpenEnded_mscoco_val2014_questions.json"
    asked = json.loads(path.read_text())
    asked["questions"].insert(1, asked["questions"][0])
    path.write_text(json.dumps(asked))
    found = evaluate(tuned, capsys, "--suite=vqa", f"--documents=vqav2:{vqa}")
    assert found["stage"] == "sft" and found["docs"] == 1 and found["n"] == 2
    assert set(found["by_answer_type"]) == {"other"} and 0 <= found["accuracy"] <= 1
    assert len(found["rejected"]) == 5 and len(found["answers"]) == 2
    edits = public_instructions.edits(tmp_path / "edits")
    found = evaluate(tuned, capsys, "--suite=edit", f"--documents=instruct-pix2pix:{edits}")
    assert found["joint"]["n"] == 3 and -1 <= found["fidelity"]["mean"] <= 1
    capsys.readouterr()
    coco = public_instructions.coco(tmp_path / "coco")
    command = ["eval", "--suite=caption", f"--workdir={tuned}", f"--documents=coco-captions:{coco}"]
    assert main.main(command) == 2
    assert "1 good items, but 2 are needed; the first bad one is" in capsys.readouterr().err


@pytest.mark.slow
def test_a_decoder_is_tuned_on_public_files_and_asked_about_them(tmp_path, tiny_run, capsys):
    """Boxes and structures, of which scenes are asked too; bad records are counted."""
    coco = public_instructions.coco(tmp_path / "coco")
    maps = public_instructions.feature_maps(tmp_path / "maps")
    specs = [f"coco-boxes:{coco}", f"controlnet:{maps}"]
    tasks = '--config.sft.tasks={"text_to_image": 16, "draw_boxes": 16}'
    workdir = tmp_path / "run"
    more = (tasks, f"--config.sft.files={json.dumps(specs)}", "--config.sft.num_test=0")
    assert main.main(tune(workdir, tiny_run, *more)) == 0
    metrics = files.read_json(workdir / "metrics.json")["sft"]
    assert metrics["files"] == {
        specs[0]: {"items": 1, "rejected": 2},
        specs[1]: {"items": 2, "rejected": 2},
    }
    assert set(metrics["shares"]) == {"text_to_image", "draw_boxes", *specs}
    assert sum(metrics["shares"].values()) == pytest.approx(1)
    found = evaluate(workdir, capsys, "--suite=structure", f"--documents=controlnet:{maps}")
    assert found["docs"] == 1 and found["similarity"]["n"] == 2 and len(found["rejected"]) == 2
    scenes = "--documents=scenes:easy/test/test"
    found = evaluate(workdir, capsys, "--suite=boxes", scenes, "--limit=4")
    assert {"entity", "place", "color", "box", "joint"} <= set(found) and found["docs"] == 1
    command = ["eval", "--suite=structure", f"--workdir={workdir}", scenes, "--docs=2"]
    assert main.main(command) == 2
    assert "beside what is given the decoder reads 1" in capsys.readouterr().err


@pytest.mark.slow
def test_suites_score_scenes_exactly(tuned, capsys):
    scenes = "--documents=scenes:easy/test/test"
    found = evaluate(tuned, capsys, "--suite=vqa", scenes, "--limit=40", "--stage=decoder")
    assert found["stage"] == "decoder" and found["n"] == 40
    assert set(found["by_task"]) == {"what", "where", "which_color"}
    found = evaluate(tuned, capsys, "--suite=caption", scenes, "--limit=4", "--docs=0")
    assert found["docs"] == 0 and {"cider", "right"} <= set(found)
    found = evaluate(tuned, capsys, "--suite=edit", scenes, "--limit=4")
    assert set(found["joint"]) == {"accuracy", "ci95", "n"}
