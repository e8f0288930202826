"""VisDial's published files: every round with candidates is read, and a bad record is a reject."""

import json

import public_instructions
import pytest
from etils import epath

from rag_mm.core.errors import UserError
from rag_mm.data import visdial_files
from rag_mm.memory.writing import stream


@pytest.fixture
def folder(tmp_path):
    return epath.Path(public_instructions.dialogs(tmp_path))


def read(folder):
    found = list(visdial_files.read_rounds(folder, 4))
    rejects = [each for each in found if isinstance(each, stream.Reject)]
    return [each for each in found if not isinstance(each, stream.Reject)], rejects


def test_rounds_have_their_history_candidates_and_relevance(folder):
    (first, second), _ = read(folder)
    assert (first.id, first.question, first.history) == ("185565-1", "is it day", ())
    assert first.caption == "a man on a horse" and first.picture.shape == (4, 4, 3)
    assert first.candidates == ("yes", "no", "brown", "a field", "1 man")
    assert first.candidates[first.right] == "no" and first.relevance is None
    assert second.history == (("is it day", "no"),)
    assert second.candidates[second.right] == "1 man"
    assert second.relevance == (0.8, 0, 0, 0.2, 0)


def test_bad_records_are_rejected_by_name(folder):
    _, rejects = read(folder)
    assert [(each.name, each.reason) for each in rejects] == [
        ("image 7", "missing-picture"),
        ("image 185565", "bad-field"),
        ("image 185565", "bad-field"),
        ("image number 5", "not-json"),
    ]


def test_in_the_test_split_only_the_last_round_is_asked_and_its_answer_is_secret(folder):
    whole = json.loads((folder / "visdial_1.0_val.json").read_text())
    dialog = whole["data"]["dialogs"][0]["dialog"]
    del dialog[0]["answer_options"], dialog[0]["gt_index"]
    del dialog[1]["gt_index"], dialog[1]["answer"]
    whole["data"]["dialogs"] = whole["data"]["dialogs"][:1]
    (folder / "visdial_1.0_val.json").write_text(json.dumps(whole))
    (only,), rejects = read(folder)
    assert (only.id, only.right, only.history) == ("185565-2", None, (("is it day", "no"),))
    assert not rejects


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("visdial_1.0_val.json", {"split": "val2018", "data": {}}, "no list 'questions' in data"),
        ("visdial_1.0_val_dense_annotations.json", {}, "is no list"),
        ("visdial_1.0_val_dense_annotations.json", [{"image_id": 1}], "has an entry without"),
        ("visdial_1.0_train.json", {}, "has 2 files"),
    ],
)
def test_files_of_another_form_are_refused(folder, name, content, message):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read(folder)
