"""Scene tasks: instructions about emoji scenes whose answers are exact.

A task turns the scenes of a source into items of what is given and what is wanted, so that it is split like
the scenes: by class, role and seed. Its scorer rates words or pictures against the facts of what is wanted.
Each family of tasks is one module; `task_table.TASKS` holds them all.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rag_mm.core.document_types import Document, Image, Segment, Text
from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import art, emoji_scenes, scene_facts
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts, Level, Scenes

Scores = Mapping[str, bool | float]  # Shares are 0..1.
Output = Sequence[Segment]  # What a model answers: text, images, or both in turn.


@dataclasses.dataclass(frozen=True, eq=False)
class TaskItem:
    """What is given and what is wanted; images are uint8 [S, S, 3].

    Attributes:
        level: the level of the scene that the item is made from.
        source: the facts of that scene.
        prompt: what is given, in order.
        target: what is wanted, in order; only its images or its text are scored.
        facts: the facts of each image of the target in order, or of the images that a text is about.
        answers: all accepted answers in words; empty unless the task is a question.
        choices: the answers among which there is to choose; empty if any name may be the answer.
    """

    level: Level
    source: Facts
    prompt: tuple[Segment, ...]
    target: tuple[Segment, ...]
    facts: tuple[Facts, ...]
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


# Rates outputs, one per item.
ScoreFunction = Callable[[Sequence[TaskItem], Sequence[Output]], list[Scores]]


@dataclasses.dataclass(frozen=True)
class SceneTask:
    """A kind of instruction about scenes.

    Attributes:
        name: its name in `task_table.TASKS`.
        make: makes the item of scene `index` of a source; all chance comes from the generator.
        score: rates outputs, one per item; every scorer says True, or 1.0, to the targets themselves.
        is_defined: whether scenes of a level have such items.
    """

    name: str
    make: Callable[[Scenes, int, np.random.Generator], TaskItem]
    score: ScoreFunction
    is_defined: Callable[[Level], bool] = lambda level: True


class TaskItems:
    """Random access to the items of one task over a source of scenes.

    An item depends only on its number and the arguments. Source pictures keep the role of their scenes; the
    picture that an edit asks for may be a scene of another role, but never shows a class of another split.
    """

    def __init__(self, task: SceneTask, scenes: Scenes, num_variants: int = 1):
        """Selects the scenes that have such an item.

        Args:
            task: what is asked.
            scenes: which scenes are asked about.
            num_variants: how many items with different chance are made of each scene. All scenes come once
                before any comes again.

        Raises:
            UserError: the task is defined for none of the scenes.
        """
        self.task, self.scenes = task, scenes
        self.indices = [i for i, level in enumerate(scenes.levels) if task.is_defined(level)]
        self._num_variants = num_variants
        if not self.indices:
            raise UserError(f"{scenes} have no items of the task {task.name!r}; take other levels.")

    def __len__(self) -> int:
        return len(self.indices) * self._num_variants

    def __getitem__(self, number: int) -> TaskItem:
        """Item `number`, 0..len-1."""
        index, variant = self._locate(number)
        purpose = f"{self.task.name} of {self.scenes.scene_id(index)}"
        rng = emoji_scenes.make_rng(purpose, self.scenes.seed, variant)
        return self.task.make(self.scenes, index, rng)

    def document(self, number: int) -> Document:
        """Item `number` as the segments of its prompt and its target; its id is `task-scene-variant`."""
        index, variant = self._locate(number)
        item = self[number]
        name = f"{self.task.name}-{self.scenes.scene_id(index)}-{variant}"
        return Document(name, item.prompt + item.target, license=emoji_scenes.LICENSE)

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        variant, position = divmod(number, len(self.indices))
        return self.indices[position], variant


def picture(facts: Facts, level: Level) -> Image:
    """A scene as a segment."""
    return Image(emoji_scenes.render(facts, level))


def first_name(entity: Entity) -> str:
    """The name of what is drawn."""
    return art.load_art().names[entity.class_id][0]


def any_name(entity: Entity, rng: np.random.Generator) -> str:
    """One of the names of an entity's class."""
    names = art.load_art().names[entity.class_id]
    return names[rng.integers(len(names))]


def normalize(text: str) -> str:
    """Answers are compared in lower case, with single spaces, without first articles or a final period."""
    words = " ".join(text.lower().split()).removesuffix(".").strip()
    return re.sub(r"^((a|an|the) )+", "", words)


def class_of_name(name: str) -> int:
    """The class of which a normalized name is one, or -1 if there is none."""
    return _classes_by_name().get(normalize(name), -1)


@functools.cache
def _classes_by_name() -> dict[str, int]:
    names = art.load_art().names
    return {normalize(name): i for i, own in enumerate(names) for name in own}


def images_of(output: Output) -> list[np.ndarray]:
    """The pixels of all images of an output, in order."""
    return [segment.pixels for segment in output if isinstance(segment, Image)]


def text_of(output: Output) -> str:
    """All text of an output, joined by spaces."""
    return " ".join(segment.text for segment in output if isinstance(segment, Text))


def score_texts(
    judge: Callable[[TaskItem, str], Scores],
) -> ScoreFunction:
    """Makes a scorer of `judge(item, text)`."""

    def score(items: Sequence[TaskItem], outputs: Sequence[Output]) -> list[Scores]:
        return [judge(item, text_of(own)) for item, own in zip(items, outputs, strict=True)]

    return score


def score_images(
    judge: Callable[[TaskItem, list[np.ndarray]], Scores],
) -> ScoreFunction:
    """Makes a scorer of `judge(item, images)`; ValueError for another number of images than wanted."""

    def score(items: Sequence[TaskItem], outputs: Sequence[Output]) -> list[Scores]:
        pixels = [_wanted_images(*pair) for pair in zip(items, outputs, strict=True)]
        return [judge(item, own) for item, own in zip(items, pixels, strict=True)]

    return score


def score_facts(
    judge: Callable[[TaskItem, list[Facts]], Scores],
    level_of: Callable[[Level], Level] = lambda level: level,
) -> ScoreFunction:
    """Makes a scorer of `judge(item, facts)`, with the facts read from the images of the output.

    The scorer raises ValueError for another number of images than wanted. It reads all images together, which
    is several times faster than one item at a time.

    Args:
        judge: rates the facts of an output's images.
        level_of: the level by which images are read, for an item's level.
    """

    def score(items: Sequence[TaskItem], outputs: Sequence[Output]) -> list[Scores]:
        if not items:
            return []
        pixels = [_wanted_images(*pair) for pair in zip(items, outputs, strict=True)]
        levels = [
            level_of(item.level) for item, own in zip(items, pixels, strict=True) for _ in own
        ]
        read = iter(scene_facts.read(np.stack([one for own in pixels for one in own]), levels))
        return [
            judge(item, [next(read) for _ in own]) for item, own in zip(items, pixels, strict=True)
        ]

    return score


def _wanted_images(item: TaskItem, output: Output) -> list[np.ndarray]:
    pixels, wanted = images_of(output), len(images_of(item.target))
    if len(pixels) != wanted:
        raise ValueError(f"{wanted} images are wanted, not {len(pixels)}")
    return pixels


def compare_boxes(read: Facts, asked: Facts, level: Level) -> dict[str, bool]:
    """`scene_facts.compare`, and `box`: all boxes are right to the pixel; `joint` requires it, too."""
    right = scene_facts.compare(read, asked, level)
    boxes = [sorted((e.row, e.column, e.size) for e in facts.entities) for facts in (read, asked)]
    box = boxes[0] == boxes[1]
    return {**right, "box": box, "joint": right["joint"] and box}
