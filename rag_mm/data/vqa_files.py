"""VQA version 2 (Goyal et al. 2017, visualqa.org/download.html, "Input questions" and "Annotation format").

`v2_OpenEnded_mscoco_SPLIT_questions.json` has `data_subtype`, the split, and `questions` with `question_id`,
`image_id` and `question`; `v2_mscoco_SPLIT_annotations.json` has `annotations` with `question_id`,
`multiple_choice_answer` (the most frequent one), `answers`, ten objects with `answer`, and `question_type`
and `answer_type`. A picture is `COCO_SPLIT_` and its id in twelve digits, in the folder `SPLIT` or
`Images/SPLIT`.
"""

import functools
from collections.abc import Iterator
from typing import Any

from etils import epath

from rag_mm.core.errors import UserError
from rag_mm.data import captions, instruction_records
from rag_mm.data.instruction_items import ANSWER, InstructionItem
from rag_mm.data.instruction_records import Found

TYPES = ("question_type", "answer_type")


def read_questions(path: epath.Path, image_size: int) -> Iterator[Found]:
    """Items of the task `question`, one for each question; also with the fields `TYPES` where given.

    Args:
        path: a folder with one file of questions and its annotations, or the file of questions.
        image_size: height and width in pixels to which pictures are scaled.

    Raises:
        UserError: a file is missing, or not of this form.
    """
    file = instruction_records.find_file(path, "*questions.json", "*/*questions.json")
    found = instruction_records.read_lists(file, "questions")
    split = found.get("data_subtype")
    if not isinstance(split, str) or not split or "/" in split:
        raise UserError(f"{file} has no data_subtype, such as val2014; give the published file.")
    annotations = instruction_records.read_lists(_find_annotations(file, split), "annotations")
    answers = {}
    for number, entry in enumerate(annotations["annotations"], start=1):
        if isinstance(entry, dict) and type(entry.get("question_id")) is int:
            answers[entry["question_id"]] = entry
        else:
            bad = captions.BadRecord("bad-field", "has no question_id.")
            yield bad.as_reject(f"annotation number {number}")
    names = [split, f"Images/{split}", f"Images/mscoco/{split}", "images"]
    folder = instruction_records.find_folder(file, *names, *(f"../{name}" for name in names))
    for number, question in enumerate(found["questions"], start=1):
        yield instruction_records.attempt(
            instruction_records.name_of(question, "question", "question_id", number),
            functools.partial(_item, folder, split, question, answers, image_size),
        )


def _find_annotations(file: epath.Path, split: str) -> epath.Path:
    """The annotations of a file of questions: beside it, or in a folder beside its own."""
    patterns = [f"*{split}_annotations.json", f"*/*{split}_annotations.json"]
    for folder in (file.parent, file.parent.parent):
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return instruction_records.find_file(folder, *patterns)
    raise UserError(f"{file.parent} has no *{split}_annotations.json; put it beside {file.name}.")


def _item(
    folder: epath.Path, split: str, question: Any, answers: dict[int, Any], image_size: int
) -> InstructionItem:
    fields = instruction_records.fields_of(question)
    question_id = instruction_records.id_of(fields, "question_id")
    image_id = instruction_records.id_of(fields, "image_id")
    text = instruction_records.text_of(fields, "question")
    if question_id not in answers:
        raise captions.BadRecord("bad-field", "has no annotation.")
    entry = answers[question_id]
    people = entry.get("answers")
    if not isinstance(people, list) or not people:
        raise captions.BadRecord("bad-field", "has no answers.")
    said = tuple(_answer(each) for each in people)
    words = {"question": text, ANSWER: instruction_records.text_of(entry, "multiple_choice_answer")}
    words |= {key: entry[key] for key in TYPES if isinstance(entry.get(key), str)}
    name = f"COCO_{split}_{image_id:012d}.jpg"
    picture = instruction_records.read_picture(folder, name, image_size)
    return InstructionItem(str(question_id), "question", words, picture, answers=said)


def _answer(entry: Any) -> str:
    """What one person said; empty if that is no text. Of the ten it still counts, as in the evaluation."""
    try:
        return instruction_records.text_of(instruction_records.fields_of(entry), "answer")
    except captions.BadRecord:
        return ""
