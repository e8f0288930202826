"""Public instruction data: good records become items, bad ones are named, in the published layouts."""

import json

import numpy as np
import public_instructions
import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import instruction_files

SIZE = 4


def read(layout, folder):
    source = instruction_files.InstructionFiles(f"{layout}:{folder}")
    items = list(source.read(SIZE))
    return items, {reject.name: (reject.reason, reject.detail) for reject in source.rejects}


def test_edits_of_instruct_pix2pix(tmp_path):
    items, rejects = read("instruct-pix2pix", public_instructions.edits(tmp_path))
    assert [item.id for item in items] == ["0000000/11", "0000000/12", "0000001/21"]
    assert items[0].task == "edit" and not items[0].wants_text
    assert items[0].fields == {
        "edit": "have her ride a dragon",
        "input": "photograph of a girl riding a horse",
        "output": "photograph of a girl riding a dragon",
    }
    assert items[2].fields == {"edit": "make it snow"}
    assert items[0].picture.shape == items[0].given[0].shape == (SIZE, SIZE, 3)
    assert not np.array_equal(items[0].picture, items[0].given[0])
    assert {name: reason for name, (reason, _) in rejects.items()} == {
        "0000001/22": "missing-picture",
        "0000002/31": "not-json",
        "entry 4 of seeds.json": "not-json",
    }
    assert "22_1.jpg" in rejects["0000001/22"][1]


def test_feature_maps_of_controlnet(tmp_path):
    items, rejects = read("controlnet", public_instructions.feature_maps(tmp_path))
    assert [item.fields for item in items] == [
        {"caption": "cyan circle on pink", "feature": "structure"},
        {"caption": "a", "feature": "canny"},
    ]
    assert [len(item.given) for item in items] == [1, 1]
    assert {name: reason for name, (reason, _) in rejects.items()} == {
        "line 3": "missing-picture",
        "line 4": "not-json",
    }


def test_captions_of_coco(tmp_path):
    items, rejects = read("coco-captions", public_instructions.coco(tmp_path))
    (item,) = items
    assert item.id == "397133" and item.wants_text
    assert item.answers == ("A man is in a kitchen making pizzas.", "Man in apron standing.")
    assert item.fields == {"answer": item.answers[0]}
    assert item.picture.min() > 150  # cropped to the light square at the middle
    assert {name: reason for name, (reason, _) in rejects.items()} == {
        "annotation 2": "bad-field",
        "annotation 3": "bad-field",
        "image 37777": "missing-picture",
    }


@pytest.mark.parametrize(
    ("layout", "name"), [("coco-captions", "captions"), ("coco-boxes", "instances")]
)
def test_images_of_coco_without_an_id_are_named(tmp_path, layout, name):
    folder = public_instructions.coco(tmp_path)
    path = folder / "annotations" / f"{name}_val2017.json"
    found = json.loads(path.read_text())
    good, rejects = read(layout, folder)
    found["images"] += [{"file_name": "1.jpg"}, "broken"]
    found["annotations"].append(found["annotations"][0] | {"image_id": -1, "id": 77})
    path.write_text(json.dumps(found))
    again, more = read(layout, folder)
    assert [item.id for item in again] == [item.id for item in good]
    assert {name: reason for name, (reason, _) in more.items() if name not in rejects} == {
        "image number 4": "bad-field",
        "image number 5": "not-json",
        "annotation 77": "bad-field",
    }


def test_boxes_of_coco_are_told_in_the_cropped_picture(tmp_path):
    """Of 16 x 8 pixels columns 4 to 11 are kept, at half the size."""
    items, rejects = read("coco-boxes", public_instructions.coco(tmp_path))
    (item,) = items
    assert item.fields == {
        "caption": "A man is in a kitchen making pizzas.",
        "boxes": "bottle at 0 1 to 2 3 and dining table at 0 0 to 4 4",
    }
    assert rejects["annotation 4"][1].endswith("which is no box in a picture.")
    assert "no name" in rejects["annotation 5"][1]
    path = tmp_path / "annotations" / "instances_val2017.json"
    found = json.loads(path.read_text())
    found["annotations"][0]["bbox"] = [5.0, 2.0, 40.0, 4.0]
    path.write_text(json.dumps(found))
    (tmp_path / "annotations" / "captions_val2017.json").unlink()
    items, rejects = read("coco-boxes", path)  # The file itself may be named.
    assert not items and "reaches beyond its 16 x 8 pixels" in rejects["image 397133"][1]


def test_questions_of_vqa(tmp_path):
    items, rejects = read("vqav2", public_instructions.questions(tmp_path))
    (item,) = items
    assert item.fields == {
        "question": "Where is he looking?",
        "answer": "down",
        "question_type": "none of the above",
        "answer_type": "other",
    }
    assert len(item.answers) == 10 and item.answers[5] == "at table"
    assert {name: reason for name, (reason, _) in rejects.items()} == {
        "annotation number 4": "bad-field",
        "question 393225000": "missing-picture",
        "question 262148001": "bad-field",
        "question 262148002": "bad-field",
        "question number 5": "not-json",
    }
    assert "COCO_val2014_000000393225.jpg" in rejects["question 393225000"][1]


def test_a_person_who_said_nothing_of_vqa_still_counts(tmp_path):
    """One of the ten, as in the official evaluation."""
    folder = public_instructions.questions(tmp_path)
    (path,) = folder.glob("*_annotations.json")
    found = json.loads(path.read_text())
    people = found["annotations"][0]["answers"]
    people[0]["answer"], people[1]["answer"], people[2] = "", 7, {"answer_id": 3}
    path.write_text(json.dumps(found))
    (item,), _ = read("vqav2", folder)
    assert item.answers == (
        "",
        "",
        "",
        "down",
        "down",
        *["at table"] * 2,
        "skateboard",
        "down",
        "table",
    )
    assert item.fields["answer"] == "down"


def test_questions_and_annotations_may_be_in_folders_of_their_own(tmp_path):
    public_instructions.questions(tmp_path)
    for name, folder in (("questions", "Questions"), ("annotations", "Annotations")):
        (tmp_path / folder).mkdir()
        (file,) = tmp_path.glob(f"*_{name}.json")
        file.rename(tmp_path / folder / file.name)
    (tmp_path / "Images").mkdir()
    (tmp_path / "val2014").rename(tmp_path / "Images" / "val2014")
    items, _ = read("vqav2", tmp_path)
    assert [item.id for item in items] == ["262148000"]


@pytest.mark.parametrize("layout", public_instructions.FOLDERS)
def test_a_second_reading_is_the_same(tmp_path, layout):
    source = instruction_files.InstructionFiles(
        f"{layout}:{public_instructions.FOLDERS[layout](tmp_path)}"
    )
    first = [item.id for item in source.read(SIZE)], list(source.rejects)
    assert first == ([item.id for item in source.read(SIZE)], source.rejects)
    assert first[0] and first[1]


def test_what_is_none_of_them_is_refused_in_a_sentence(tmp_path):
    for spec, message in (
        ("vqav2", "LAYOUT:PATH"),
        ("coco:x", "coco-captions"),
        (f"vqav2:{tmp_path}/none", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            instruction_files.InstructionFiles(spec)
    for layout in instruction_files.LAYOUTS:
        with pytest.raises(UserError, match="has no file"):
            read(layout, tmp_path)
    public_instructions.put(tmp_path / "captions_a.json", {"images": 3})
    with pytest.raises(UserError, match="has no list 'images'"):
        read("coco-captions", tmp_path)
    public_instructions.put(tmp_path / "captions_b.json", {})
    with pytest.raises(UserError, match="2 files"):
        read("coco-captions", tmp_path)
    public_instructions.put(tmp_path / "x_questions.json", {"questions": [], "data_subtype": "a"})
    with pytest.raises(UserError, match="_annotations.json"):
        read("vqav2", tmp_path)


def test_a_picture_outside_of_the_folder_is_not_read(tmp_path):
    folder = public_instructions.feature_maps(tmp_path / "data")
    public_instructions.put(tmp_path / "secret.png", public_instructions.WIDE)
    line = {"source": "../secret.png", "target": "target/0.png", "prompt": "a"}
    public_instructions.put(folder / "prompt.json", line)
    items, rejects = read("controlnet", folder)
    assert not items and rejects["line 1"][0] == "leads-outside"
