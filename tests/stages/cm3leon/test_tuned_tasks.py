"""Which tasks a decoder was tuned on, by its stage's manifest, and what is said where one is missing."""

import json

import pytest

from rag_mm.core import run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages.cm3leon import tuned_tasks


def run_with(folder, config):
    (folder / "sft").mkdir()
    manifest = {"stage": "sft", "status": "done", "config": config, "inputs": {}}
    (folder / "sft" / "manifest.json").write_text(json.dumps(manifest))
    return run_folder.Run(folder)


@pytest.mark.parametrize(
    ("config", "tasks"),
    [
        ({"tasks": {"recolor": 3, "what": 4}}, {"recolor", "what"}),
        ({"tasks": {"recolor": 3}, "files": ["coco-boxes:data"]}, {"recolor", "boxes"}),
        ({"tasks": {"no_such_task": 3}, "files": ["x:y"]}, set()),
        ({"optimizer": {}}, set()),
    ],
)
def test_what_a_stage_was_tuned_on(tmp_path, config, tasks):
    run = run_with(tmp_path, config)
    assert tuned_tasks.read(run, "sft") == tasks
    assert tuned_tasks.read(run, "decoder") == set()


def test_edits_by_their_pictures():
    assert tuned_tasks.edits(1) == ("edit", "recolor", "move")
    assert tuned_tasks.edits(2) == ("swap",)


def test_the_known_of_the_wanted_tasks():
    tuned = {"swap", "boxes", "draw_boxes"}
    assert tuned_tasks.known(tuned, tuned_tasks.BOXES, "boxes") == ["draw_boxes", "boxes"]
    with pytest.raises(
        UserError, match=r"tuned on boxes, draw_boxes, swap, not on questions; tune"
    ):
        tuned_tasks.known(tuned, tuned_tasks.QUESTIONS, "questions")
    with pytest.raises(
        UserError, match=r"was not tuned on boxes; load .* \(stage sft, --stage=sft\)"
    ):
        tuned_tasks.known((), tuned_tasks.BOXES, "boxes")
