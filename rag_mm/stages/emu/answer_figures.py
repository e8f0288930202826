"""Figures of answers about test scenes, asked plainly or as a dialogue, with or without examples."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.core.document_types import Text
from rag_mm.data.interleaved import Part, Parts
from rag_mm.memory import retrieval_memory, rices
from rag_mm.stages.emu import dialogue_rows, training_documents
from rag_mm.stages.emu.rollout_figures import Values
from rag_mm.stages.emu.saved_emu import LoadedEmu
from rag_mm.stages.emu.tested_scenes import EncodedPictures, TestedScenes
from rag_mm.stages.shared import world_config
from rag_mm.worlds.emoji import emoji_scenes, scene_captions
from rag_mm.worlds.emoji.emoji_scenes import Scenes
from rag_mm.worlds.emoji.scene_tasks import SceneTask, TaskItem

RICES, RANDOM = "rices", "random"
_ROOM = 24  # Tokens left for an answer.
_STREAM = "Emu question"  # Purpose of random streams.
Turns = list[tuple[Parts, str | None]]


class Asked(NamedTuple):
    """A model and how it is asked: what is said and answered, turn by turn, as a prompt."""

    emu: LoadedEmu
    wrap: Callable[[Turns], Parts]
    asks_captions: bool  # Whether a caption is asked for in words.


def plainly(turns: Turns) -> Parts:
    """Images, questions and answers one after the other, as an untuned model is asked."""
    parts: list[Part] = []
    for said, answer in turns:
        parts += [*said, *([] if answer is None else [answer])]
    return tuple(parts)


def ask(
    asked: Mapping[str, Asked],
    pictures: EncodedPictures,
    tested: TestedScenes,
    tasks: Sequence[SceneTask],
) -> tuple[Values, dict[str, dict[str, list[str]]]]:
    """Asks each model each task, without a document and after one that the scene's image retrieved.

    Returns:
        By variant, `NAME` and `NAME_retrieved`, the figures of `_answers` of each task; and the answers.
    """
    values: Values = {}
    written: dict[str, dict[str, list[str]]] = {}
    for name, model in asked.items():
        for variant, documents in ((name, "none"), (f"{name}_retrieved", "retrieved")):
            before = tested.before_images(documents)
            values[variant], written[variant] = {}, {}
            for task in tasks:
                items, places = _items(task, tested)
                prompts = [
                    (*before[place], *model.wrap([(_said(model, task, item, number), None)]))
                    for item, place in zip(items, places, strict=True)
                    for number in [int(tested.numbers[place])]
                ]
                found, texts = _answers(model, pictures, task, items, prompts)
                values[variant] |= found
                written[variant][task.name] = texts
    return values, written


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples for each test scene, rows of the memory in prompt order, the nearest last.

    Attributes:
        sources: the scenes that the memory was made of, in the order of its rows.
        rows: by how they were chosen, int [Q, K], -1 for a missing one.
    """

    sources: tuple[Scenes, ...]
    rows: Mapping[str, np.ndarray]

    def scene(self, row: int) -> tuple[Scenes, int]:
        """The source of a row, and its number there."""
        for source in self.sources:
            if row < len(source):
                return source, row
            row -= len(source)
        raise IndexError(row)


def choose(
    memory: retrieval_memory.Memory,
    world: world_config.EmojiWorld,
    tested: TestedScenes,
    most: int,
    seed: int,
) -> Examples:
    """`most` examples of each test scene: the memory's with the nearest images, and random ones."""
    images = np.stack([tested.scenes.image(int(row)) for row in tested.rows])
    queries = memory.encode(image=images)
    rng = np.random.default_rng((seed, 11))
    found = rices.select_examples(memory.index("image").search, queries, most)
    sources = tuple(
        world.scenes("memory", *names) for names in (world_config.SEEN, world_config.HELD_OUT)
    )
    drawn = np.stack([rng.choice(len(memory), most, replace=False) for _ in images])
    return Examples(sources, {RICES: found.ids, RANDOM: drawn})


def few_shot(
    model: Asked,
    pictures: EncodedPictures,
    tested: TestedScenes,
    tasks: Sequence[SceneTask],
    shots: Sequence[int],
    examples: Examples,
) -> Values:
    """By `rices_K` and `random_K` (`none` for 0), the figures of `_answers` of each task after K examples.

    `TASK_read` is the number of examples that the model's length has room for, of which those farthest from
    the question are left out.
    """
    values: Values = {}
    variants = {
        f"{choice}_{count}" if count else "none": rows[:, rows.shape[1] - count :]
        for count in shots
        for choice, rows in examples.rows.items()
    }
    for variant, rows in variants.items():
        values[variant] = {}
        for task in tasks:
            items, places = _items(task, tested)
            turns = [
                [
                    *_examples(model, pictures, task, examples, rows[place]),
                    (_said(model, task, item, int(tested.numbers[place])), None),
                ]
                for item, place in zip(items, places, strict=True)
            ]
            kept = [_fitted(model, each) for each in turns]
            prompts = [model.wrap(each) for each in kept]
            values[variant] |= _answers(model, pictures, task, items, prompts)[0]
            num_read = np.array([len(each) - 1 for each in kept], float)
            values[variant][f"{task.name}_read"] = num_read
    return values


def _examples(
    model: Asked, pictures: EncodedPictures, task: SceneTask, examples: Examples, rows: np.ndarray
) -> Turns:
    """The task about scenes of the memory, with its answers; scenes without such an item are left out."""
    turns: Turns = []
    for row in rows[rows >= 0].tolist():
        scenes, at = examples.scene(row)
        if task.is_defined(scenes.levels[at]):
            facts, item = scenes.facts(at), _item(task, scenes, at)
            number = training_documents.scene_number(pictures.album, facts, scenes.levels[at])
            turns.append((_said(model, task, item, number), dialogue_rows.answer_of(item)))
    return turns


def _fitted(model: Asked, turns: Turns) -> Turns:
    """The last turns, as many as leave room for an answer."""
    most = model.emu.config.decoder.max_seq_len - _ROOM
    while len(turns) > 1 and model.emu.maker.length(model.wrap(turns)) > most:
        turns = turns[1:]
    return turns


def _answers(
    model: Asked,
    pictures: EncodedPictures,
    task: SceneTask,
    items: Sequence[TaskItem],
    prompts: Sequence[Parts],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Figures of the answers, float [Q], and the answers, of at most `_ROOM` tokens.

    `TASK` is whether it is right, `TASK_nll` the mean NLL of the wanted answer in nats, and `TASK_entity` and
    so on whether a caption states these.
    """
    # One number for all tasks, so that few programs are compiled.
    texts = model.emu.write(list(prompts), pictures.vectors, _ROOM)
    scores = task.score(items, [(Text(text),) for text in texts])
    wanted: list[Parts] = [(dialogue_rows.answer_of(item),) for item in items]
    figures = {f"{task.name}_nll": model.emu.text_nll(prompts, wanted, pictures.vectors)}
    for key in scores[0]:
        name = task.name if key == "right" else f"{task.name}_{key}"
        figures[name] = np.array([float(each[key]) for each in scores])
    return figures, texts


def shares(tasks: Sequence[SceneTask]) -> set[str]:
    """The figures that are 0 or 1."""
    facts = ("entity", "place", "color")
    return {task.name for task in tasks} | {f"caption_{fact}" for fact in facts}


def _items(task: SceneTask, tested: TestedScenes) -> tuple[list[TaskItem], list[int]]:
    """The items of a task, and the place of the test scene of each."""
    places = [i for i, level in enumerate(tested.levels) if task.is_defined(level)]
    return [_item(task, tested.scenes, int(tested.rows[i])) for i in places], places


def _item(task: SceneTask, scenes: Scenes, row: int) -> TaskItem:
    rng = emoji_scenes.make_rng(f"{_STREAM} {task.name} of {scenes.scene_id(row)}", scenes.seed)
    return task.make(scenes, row, rng)


def _said(model: Asked, task: SceneTask, item: TaskItem, number: int) -> Parts:
    """What the user says: the picture and, unless it is understood, the question."""
    is_understood = task is scene_captions.CAPTION and not model.asks_captions
    return (number,) if is_understood else (number, dialogue_rows.question_of(item))
