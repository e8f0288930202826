"""Small folders in the published layouts of instruction data, with every field that the sources list.

Sources: InstructPix2Pix, github.com/timothybrooks/instruct-pix2pix (edit_dataset.py and the README);
ControlNet, github.com/lllyasviel/ControlNet (its page on training, fill50k); COCO,
cocodataset.org/#format-data ("Object detection", "Image captioning"); VQA version 2,
visualqa.org/download.html ("Input questions format", "Annotation format") and github.com/GT-Vision-Lab/VQA
(PythonHelperTools/vqaTools/vqa.py); VisDial, visualdialog.org/data and
github.com/batra-mlp-lab/visdial-challenge-starter-pytorch (visdialch/data/readers.py).
"""

import io
import json
import pathlib
from typing import Any

import numpy as np
import PIL.Image

INFO = {
    "year": 2017,
    "version": "1.0",
    "description": "COCO 2017 Dataset",
    "contributor": "COCO Consortium",
    "url": "http://cocodataset.org",
    "date_created": "2017/09/01",
}
LICENSES = [{"id": 1, "name": "Attribution License", "url": "http://creativecommons.org/"}]
WIDE = np.zeros((8, 16, 3), np.uint8)  # The square at its middle begins at column 4.
WIDE[:, 4:12] = 200


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def put(path: pathlib.Path, content: Any) -> None:
    """Writes pixels as an image, bytes as they are, and anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        buffer = io.BytesIO()
        PIL.Image.fromarray(content).save(buffer, {".jpg": "JPEG", ".png": "PNG"}[path.suffix])
        content = buffer.getvalue()
    elif not isinstance(content, bytes):
        content = json.dumps(content).encode()
    path.write_bytes(content)


def edits(folder: pathlib.Path) -> pathlib.Path:
    """InstructPix2Pix: three good pairs, a missing picture, a broken prompt, a broken entry."""
    prompt = {
        "input": "photograph of a girl riding a horse",
        "edit": "have her ride a dragon",
        "output": "photograph of a girl riding a dragon",
        "url": "https://laion.ai/1.jpg",
    }
    seeds = [["0000000", ["11", "12"]], ["0000001", [21, "22"]], ["0000002", ["31"]], "broken"]
    put(folder / "seeds.json", seeds)
    put(folder / "0000000" / "prompt.json", prompt)
    put(folder / "0000000" / "metadata.jsonl", b'{"seed": 11, "p2p_threshold": 0.3}\n')
    put(folder / "0000001" / "prompt.json", {"edit": "make it\nsnow"})
    put(folder / "0000002" / "prompt.json", b'{"edit": ')
    for name in ("0000000/11", "0000000/12", "0000001/21", "0000002/31"):
        for which in (0, 1):
            put(folder / f"{name}_{which}.jpg", pixels(which))
    put(folder / "0000001" / "22_0.jpg", pixels())
    return folder


def feature_maps(folder: pathlib.Path) -> pathlib.Path:
    """ControlNet: a good line, one with further keys, a missing picture, a broken line."""
    lines = [
        {"source": "source/0.png", "target": "target/0.png", "prompt": "cyan circle on pink"},
        {
            "source": "source/1.png",
            "target": "target/1.png",
            "prompt": "a",
            "feature": "canny",
            "x": 1,
        },
        {"source": "source/2.png", "target": "target/2.png", "prompt": "no target"},
    ]
    text = "\n".join([*map(json.dumps, lines), '{"source": "source/0.png", ', ""])
    put(folder / "prompt.json", text.encode())
    for name in ("source/0", "target/0", "source/1", "target/1", "source/2"):
        put(folder / f"{name}.png", pixels(len(name)))
    return folder


def coco(folder: pathlib.Path) -> pathlib.Path:
    """COCO: a wide picture, one that is missing, one without annotations, and bad annotations."""
    images = [
        {
            "id": image_id,
            "width": 16,
            "height": 8,
            "file_name": f"{image_id:012d}.jpg",
            "license": 1,
            "flickr_url": "http://farm7.staticflickr.com/1.jpg",
            "coco_url": "http://images.cocodataset.org/val2017/1.jpg",
            "date_captured": "2013-11-14 17:02:52",
        }
        for image_id in (397133, 37777, 252219)
    ]
    head = {"info": INFO, "images": images, "licenses": LICENSES}
    captions = [
        {"image_id": 397133, "id": 370509, "caption": "A man is in a kitchen making pizzas."},
        {"image_id": 397133, "id": 370510, "caption": "Man in apron\nstanding."},
        {"image_id": 37777, "id": 1, "caption": "The picture is missing."},
        {"image_id": 397133, "id": 2, "caption": ["no text"]},
        {"image_id": 5, "id": 3, "caption": "Of no picture."},
    ]
    put(folder / "annotations" / "captions_val2017.json", head | {"annotations": captions})
    whole = {"segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], "area": 8.5}
    objects = [
        {"category_id": 44, "bbox": [5.0, 2.0, 4.0, 4.0], "iscrowd": 0, "id": 82445},
        {"category_id": 67, "bbox": [0.0, 0.0, 16.0, 8.0], "iscrowd": 0, "id": 82446},
        {"category_id": 1, "bbox": [0, 0, 3, 3], "iscrowd": 0, "id": 82447},  # outside the square
        {"category_id": 1, "bbox": [4, 0, 8, 8], "iscrowd": 1, "id": 900100082448},
        {"category_id": 1, "bbox": [4, 0, 0, 8], "iscrowd": 0, "id": 4},
        {"category_id": 2, "bbox": [4, 0, 2, 8], "iscrowd": 0, "id": 5},
    ]
    annotations = [{"image_id": 397133, **each, **whole} for each in objects]
    categories = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 44, "name": "bottle", "supercategory": "kitchen"},
        {"id": 67, "name": "dining table", "supercategory": "furniture"},
    ]
    put(
        folder / "annotations" / "instances_val2017.json",
        head | {"annotations": annotations, "categories": categories},
    )
    for image_id in (397133, 252219):
        put(folder / "val2017" / f"{image_id:012d}.jpg", WIDE)
    return folder


def questions(folder: pathlib.Path) -> pathlib.Path:
    """VQA: a good question, one without a picture, one without an annotation, and a broken one."""
    license = {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"}
    head = {
        "info": INFO | {"version": "2.0"},
        "data_type": "mscoco",
        "data_subtype": "val2014",
        "license": license,
    }
    asked = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 393225, "question": "Is there a picture?", "question_id": 393225000},
        {"image_id": 262148, "question": "What is unanswered?", "question_id": 262148001},
        {"image_id": 262148, "question": 7, "question_id": 262148002},
        "broken",
    ]
    put(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        head | {"task_type": "Open-Ended", "questions": asked},
    )
    people = ["down"] * 5 + ["at table"] * 2 + ["skateboard", "down", "table"]
    answers = [
        {"answer": said, "answer_confidence": "yes", "answer_id": number}
        for number, said in enumerate(people, start=1)
    ]
    annotations = [
        {
            "question_type": "none of the above",
            "multiple_choice_answer": "down",
            "answers": answers,
            "image_id": question_id // 1000,
            "answer_type": "other",
            "question_id": question_id,
        }
        for question_id in (262148000, 393225000, 262148002)
    ]
    put(
        folder / "v2_mscoco_val2014_annotations.json",
        head | {"annotations": [*annotations, {"answers": []}]},
    )
    put(folder / "val2014" / "COCO_val2014_000000262148.jpg", pixels())
    return folder


def dialogs(folder: pathlib.Path) -> pathlib.Path:
    """VisDial: a dialogue of two rounds, one densely annotated, one without a picture, and broken ones."""
    options = list(range(5))
    good = [
        {"question": 0, "answer": 1, "answer_options": options, "gt_index": 1},
        {"question": 1, "answer": 4, "answer_options": options[::-1], "gt_index": 0},
    ]
    rounds = [
        (185565, "a man on a horse", good),
        (7, "the picture is missing", good),
        (185565, "a number of no text", [good[0] | {"question": 9}]),
        (185565, "an option that is none", [good[0] | {"gt_index": 5}]),
    ]
    dialogs = [
        {"image_id": image_id, "caption": caption, "dialog": dialog}
        for image_id, caption, dialog in rounds
    ]
    answers = ["yes", "no", "brown", "a field", "1 man"]
    data = {
        "questions": ["is it day", "how many men"],
        "answers": answers,
        "dialogs": [*dialogs, "broken"],
    }
    put(folder / "visdial_1.0_val.json", {"version": "1.0", "split": "val2018", "data": data})
    dense = [{"image_id": 185565, "round_id": 2, "gt_relevance": [0.8, 0, 0, 0.2, 0]}]
    put(folder / "visdial_1.0_val_dense_annotations.json", dense)
    put(folder / "VisualDialog_val2018" / "VisualDialog_val2018_000000185565.jpg", pixels())
    return folder


FOLDERS = {
    "instruct-pix2pix": edits,
    "controlnet": feature_maps,
    "coco-captions": coco,
    "coco-boxes": coco,
    "vqav2": questions,
}
