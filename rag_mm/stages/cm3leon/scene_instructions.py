"""Scene tasks as instructions: what each gives and asks, and how many retrieved documents it reads."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from rag_mm.core.document_types import Image, Text
from rag_mm.core.errors import UserError
from rag_mm.data.instruction_items import ANSWER, InstructionItem
from rag_mm.worlds.emoji import (
    emoji_scenes,
    scene_boxes,
    scene_captions,
    scene_edits,
    scene_facts,
    scene_questions,
    scene_structure,
    scene_tasks,
)
from rag_mm.worlds.emoji.emoji_scenes import Scenes
from rag_mm.worlds.emoji.scene_tasks import SceneTask, Scores, TaskItem

TEXT_TO_IMAGE = "text_to_image"
_NAME_AND_COLOR = r"(?P<name>.+) on a (?P<color>\S+) background"
_QUESTION = "(?P<question>.+)"


@dataclasses.dataclass(frozen=True)
class InstructionTask:
    """A scene task as instructions.

    Attributes:
        scene_task: makes and scores its items.
        pattern: regular expression over the last text that an item gives; its groups are the fields of the
            templates.
        num_given: pictures given besides the main one.
        num_docs: retrieved documents; None: any number that the decoder reads.
        figure: the score that stands for the task.
    """

    scene_task: SceneTask
    pattern: str
    num_given: int = 0
    num_docs: int | None = 0
    figure: str = "joint"

    @property
    def name(self) -> str:
        """The name of the scene task, which is also that of its templates."""
        return self.scene_task.name

    @property
    def wants_text(self) -> bool:
        """Whether a text about the main picture is wanted. Its documents are found by that picture."""
        return self.figure == "right"


def _make_text_to_image(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
    facts, level = scenes.facts(index), scenes.levels[index]
    target = scene_tasks.picture(facts, level)
    return TaskItem(level, facts, (Text(scenes.full_caption(index)),), (target,), (facts,))


def judge_drawn_caption(item: TaskItem, read: list[emoji_scenes.Facts]) -> Scores:
    """The keys of `scene_facts.compare`: sizes and exact offsets are no part of a caption."""
    return scene_facts.compare(read[0], item.facts[0], item.level)


DRAW_CAPTION = SceneTask(
    TEXT_TO_IMAGE, _make_text_to_image, scene_tasks.score_facts(judge_drawn_caption)
)
TASKS = {
    task.name: task
    for task in (
        InstructionTask(scene_edits.RECOLOR, "change the background to (?P<color>.+)", 1),
        InstructionTask(scene_edits.MOVE, "move the (?P<name>.+) to the (?P<place>.+)", 1),
        InstructionTask(scene_edits.SWAP, "replace the (?P<name>.+) with the one in the .+", 2),
        InstructionTask(
            scene_boxes.DRAW_BOXES,
            r"draw (?P<name>.+) at (?P<box>\d+ \d+ to \d+ \d+) on a (?P<color>\S+) background",
            num_docs=1,
        ),
        InstructionTask(scene_structure.FROM_SILHOUETTE, _NAME_AND_COLOR, 1, 1),
        InstructionTask(scene_structure.FROM_EDGES, _NAME_AND_COLOR, 1, 1),
        InstructionTask(scene_captions.CAPTION, ".+", 0, 1, "right"),
        InstructionTask(scene_questions.WHAT, _QUESTION, 0, 1, "right"),
        InstructionTask(scene_questions.WHERE, _QUESTION, 0, 1, "right"),
        InstructionTask(scene_questions.WHICH_COLOR, _QUESTION, 0, 1, "right"),
        InstructionTask(scene_questions.HOW_MANY, _QUESTION, 0, 1, "right"),
        InstructionTask(DRAW_CAPTION, "(?P<caption>.+)", 0, None),
    )
}
"""Name -> task."""


def find(name: str) -> InstructionTask:
    """The task of a name; UserError, which names all, if there is none."""
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; choose from {', '.join(TASKS)}.")
    return TASKS[name]


@dataclasses.dataclass(frozen=True, eq=False)
class SceneItem:
    """An instruction about a scene.

    Attributes:
        item: what is given and wanted.
        task_item: the same with its facts, for the scorer.
        scene: index of the scene that it is made from.
    """

    item: InstructionItem
    task_item: TaskItem
    scene: int


class SceneInstructions:
    """Random access to the instructions of one task over the scenes of a source; `scene_tasks.TaskItems`."""

    def __init__(self, task: InstructionTask, scenes: Scenes, num_variants: int = 1):
        """Raises UserError if the task is defined for none of the scenes."""
        self.task = task
        self._items = scene_tasks.TaskItems(task.scene_task, scenes, num_variants)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def scenes(self) -> Sequence[int]:
        """The scenes that have such an item, ascending; item i of the first of them is about scene i."""
        return self._items.indices

    def __getitem__(self, number: int) -> SceneItem:
        """Item `number`, 0..len-1."""
        made, task = self._items[number], self.task
        scene = self.scenes[number % len(self.scenes)]
        text = [segment.text for segment in made.prompt if isinstance(segment, Text)][-1]
        match = re.fullmatch(task.pattern, text)
        if match is None:
            raise ValueError(f"{text!r} of the task {task.name} is not {task.pattern!r}")
        fields = {key: value for key, value in match.groupdict().items() if value}
        pictures = [s.pixels for s in made.prompt if isinstance(s, Image)]
        if task.wants_text:
            fields[ANSWER] = scene_tasks.text_of(made.target)
            main, *pictures = pictures
        else:
            (main,) = scene_tasks.images_of(made.target)
        name = f"{task.name}-{number}"
        item = InstructionItem(name, task.name, fields, main, tuple(pictures), made.answers)
        return SceneItem(item, made, scene)
