"""VisDial version 1.0 (Das et al. 2017, visualdialog.org/data).

`visdial_1.0_SPLIT.json` has `split`, such as val2018, and `data` with the texts `questions` and `answers`
and `dialogs` with `image_id`, `caption` and `dialog`: rounds with the numbers `question`, `answer` and
`answer_options` (100 answers) and `gt_index`, the place of the right one. In the test split only the last
round has options, and none is marked. `visdial_1.0_SPLIT_dense_annotations.json` lists `image_id`, `round_id`
from 1 and `gt_relevance`, the share of people who found each option right. A picture is
`VisualDialog_SPLIT_` and its id in twelve digits, in the folder `VisualDialog_SPLIT`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import caption_text, files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, image_decoding, instruction_records
from rag_mm.memory.writing import stream


@dataclasses.dataclass(frozen=True, eq=False)
class DialogRound:
    """A question of a dialogue, whose candidates are to be ranked.

    Attributes:
        id: image and round, such as `185565-3`.
        picture: uint8 [S, S, 3].
        caption: of the picture.
        history: earlier questions with their answers.
        question: the question.
        candidates: what may be the answer.
        right: place of the answer that was given among them; None where it is secret.
        relevance: share of people who found each candidate right; None where nobody was asked.
    """

    id: str
    picture: np.ndarray
    caption: str
    history: tuple[tuple[str, str], ...]
    question: str
    candidates: tuple[str, ...]
    right: int | None
    relevance: tuple[float, ...] | None


def read_rounds(path: epath.Path, image_size: int) -> Iterator[DialogRound | stream.Reject]:
    """The rounds of all dialogues that have candidates; a bad round makes a reject of its dialogue's rest.

    Args:
        path: a folder with one `visdial_1.0_*.json` beside dense annotations or none, or that file.
        image_size: height and width in pixels to which pictures are scaled.

    Raises:
        UserError: a file is missing, or not of this form.
    """
    names = [f"visdial_1.0_{split}.json" for split in ("val", "test", "train")]
    file = instruction_records.find_file(path, *names, *(f"*/{name}" for name in names))
    whole = files.read_object(file, data=dict, split=str)
    data, split = whole["data"], whole["split"]
    for key in ("questions", "answers", "dialogs"):
        if not isinstance(data.get(key), list):
            raise UserError(
                f"{file} has no list {key!r} in data; give a file in the published form."
            )
    folder = instruction_records.find_folder(
        file, f"VisualDialog_{split}", f"../VisualDialog_{split}", "images"
    )
    reader = _DialogReader(
        data["questions"], data["answers"], folder, split, image_size, _dense(file)
    )
    for number, dialog in enumerate(data["dialogs"], start=1):
        name = instruction_records.name_of(dialog, "image", "image_id", number)
        try:
            yield from reader.rounds(instruction_records.fields_of(dialog))
        except (captions.BadRecord, image_decoding.BadImage) as error:
            yield captions.BadRecord(error.reason, str(error)).as_reject(name)


def _dense(file: epath.Path) -> dict[tuple[int, int], list[float]]:
    """The dense annotations beside a file, by image and round; none without such a file."""
    beside = file.parent / f"{file.stem}_dense_annotations.json"
    if not beside.exists():
        return {}
    entries, found = files.read_json(beside), {}
    if not isinstance(entries, list):
        raise UserError(f"{beside} is no list; give the published file.")
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        image_id, round_id = fields.get("image_id"), fields.get("round_id")
        relevance = fields.get("gt_relevance")
        relevance = relevance if isinstance(relevance, list) else []
        is_good = relevance and all(type(value) in (int, float) for value in relevance)
        if type(image_id) is not int or type(round_id) is not int or not is_good:
            raise UserError(
                f"{beside} has an entry without image_id, round_id and gt_relevance; give the published file."
            )
        found[image_id, round_id] = [float(value) for value in relevance]
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _DialogReader:
    questions: Sequence[Any]
    answers: Sequence[Any]
    folder: epath.Path
    split: str
    image_size: int
    dense: dict[tuple[int, int], list[float]]

    def rounds(self, dialog: dict[str, Any]) -> Iterator[DialogRound]:
        """The rounds of a dialogue; raises BadRecord or BadImage."""
        image_id = instruction_records.id_of(dialog, "image_id")
        caption, rounds = instruction_records.text_of(dialog, "caption"), dialog.get("dialog")
        if not isinstance(rounds, list) or not rounds:
            raise captions.BadRecord("bad-field", "has no dialog.")
        name = f"VisualDialog_{self.split}_{image_id:012d}.jpg"
        picture = instruction_records.read_picture(self.folder, name, self.image_size)
        history: tuple[tuple[str, str], ...] = ()
        for number, each in enumerate(rounds, start=1):
            fields = instruction_records.fields_of(each)
            question = self._text(self.questions, fields, "question")
            options = fields.get("answer_options")
            if options is not None:
                yield self._round(
                    fields, f"{image_id}-{number}", picture, caption, history, question,
                    self.dense.get((image_id, number)),
                )  # fmt: skip
            if number < len(rounds):
                history += ((question, self._text(self.answers, fields, "answer")),)

    def _round(
        self,
        fields: dict[str, Any],
        name: str,
        picture: np.ndarray,
        caption: str,
        history: tuple[tuple[str, str], ...],
        question: str,
        relevance: list[float] | None,
    ) -> DialogRound:
        options, right = fields["answer_options"], fields.get("gt_index")
        if not isinstance(options, list) or len(options) < 2:
            raise captions.BadRecord("bad-field", "has answer_options that are no list of answers.")
        candidates = tuple(self._text(self.answers, {"option": each}, "option") for each in options)
        if right is not None and (type(right) is not int or not 0 <= right < len(candidates)):
            raise captions.BadRecord(
                "bad-field", f"has the gt_index {right!r}, which is no option."
            )
        if relevance is not None and len(relevance) != len(candidates):
            raise captions.BadRecord(
                "bad-field", f"has {len(candidates)} options, but {len(relevance)} relevances."
            )
        dense = None if relevance is None else tuple(relevance)
        return DialogRound(name, picture, caption, history, question, candidates, right, dense)

    def _text(self, texts: Sequence[Any], fields: dict[str, Any], key: str) -> str:
        """The text that a field numbers; a few published ones are empty."""
        number = instruction_records.id_of(fields, key)
        if not 0 <= number < len(texts) or not isinstance(texts[number], str):
            raise captions.BadRecord("bad-field", f"has the {key} {number}, which is no text.")
        text = caption_text.clean(texts[number])
        captions.check_encodable(text)
        return text
