"""Asks decoders about test scenes of held-out classes, and scores their answers exactly."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.core import run_folder
from rag_mm.core.document_types import Image, Text
from rag_mm.core.errors import UserError
from rag_mm.data import instruction_items, instruction_templates, token_documents
from rag_mm.data.instruction_items import CodedItem, Instruction
from rag_mm.data.sequences import Layout
from rag_mm.decode import instruction_answers, tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.stages.cm3leon import instruction_sequences
from rag_mm.stages.cm3leon.scene_instructions import InstructionTask, SceneInstructions, SceneItem
from rag_mm.stages.ra_cm3 import generate_samples
from rag_mm.stages.shared import build_memory, coded_corpus, find_neighbors, frozen, world_config
from rag_mm.worlds.emoji.scene_tasks import Output

SPLIT = "held_out"
Answers = list[str] | list[list[int]]  # Texts, or codes of pictures.


class AskedTask(NamedTuple):
    """The items of one task, and their instructions with documents.

    Attributes:
        task: the task.
        items: what is given and wanted.
        instructions: the same as a decoder reads it.
        hits: memory rows of the retrieved documents of each, int32 [K], best first, -1 for a missing one.
    """

    task: InstructionTask
    items: list[SceneItem]
    instructions: list[Instruction]
    hits: list[np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class AskedScenes:
    """The test scenes of a run and the documents that the run retrieved for them.

    Attributes:
        run: the run, whose stage `neighbors` chose the scenes.
        world: world of the scenes.
        image_tokenizer: the run's.
        num_test: number of scenes, at most.
        split: which scenes: held_out, or tune for choices.
    """

    run: run_folder.Run
    world: world_config.EmojiWorld
    image_tokenizer: frozen.FrozenTokenizer
    num_test: int
    split: str = SPLIT

    @functools.cached_property
    def _neighbors(self) -> dict[str, np.ndarray]:
        return generate_samples.load_neighbors(self.run, self.split, self.num_test)

    def memory(self, layout: Layout) -> list[token_documents.Example]:
        """The documents that may be read."""
        corpus = coded_corpus.Corpus(layout, self.image_tokenizer)
        return corpus.memory(build_memory.open_memory(self.run))

    def items(self, task: InstructionTask) -> tuple[list[SceneItem], list[int]]:
        """The items of a task, and which of the test scenes each is about."""
        names = (find_neighbors.TEST_SPLITS | find_neighbors.TUNE_SPLITS)[self.split]
        scenes = self.world.scenes("test", *names)
        instructions = SceneInstructions(task, scenes)
        numbers = {scene: number for number, scene in enumerate(instructions.scenes)}
        rows = enumerate(self._neighbors["rows"].tolist())
        chosen = [(place, numbers[row]) for place, row in rows if row in numbers]
        return [instructions[number] for _, number in chosen], [place for place, _ in chosen]

    def hits(self, task: InstructionTask, max_docs: int) -> np.ndarray:
        """Memory rows for each test scene, int32 [Q, K], best first, -1 for a missing one."""
        count = max_docs if task.num_docs is None else task.num_docs
        return self._neighbors["image" if task.wants_text else "text"][:, :count]


@dataclasses.dataclass(frozen=True, eq=False)
class TaskScorer:
    """One decoder on test scenes; it is loaded when the first task is asked.

    Attributes:
        scenes: what is asked about.
        load: loads the decoder.
        sampling: of image codes; answers are the likeliest.
        seed: of sampling.
    """

    scenes: AskedScenes
    load: Callable[[], tasks.Generator]
    sampling: Sampling
    seed: int

    @functools.cached_property
    def _generator(self) -> tasks.Generator:
        return self.load()

    @functools.cached_property
    def _memory(self) -> list[token_documents.Example]:
        return self.scenes.memory(self._generator.layout)

    def ask(self, task: InstructionTask) -> AskedTask:
        """The items of a task among the test scenes; UserError if there is none."""
        items, places = self.scenes.items(task)
        if not items:
            raise UserError(
                f"None of the {self.scenes.num_test} test scenes has an item of the task {task.name}; raise "
                "num_test, or measure another task."
            )
        found = self.scenes.hits(task, self._generator.layout.max_docs)
        hits = [found[place] for place in places]
        tokenizer = self.scenes.image_tokenizer
        coded = instruction_sequences.encode(
            (each.item for each in items), tokenizer.encode, tokenizer.image_size
        )
        instructions = [
            word(self._generator, item, coded_corpus.pick(self._memory, rows))
            for item, rows in zip(coded, hits, strict=True)
        ]
        return AskedTask(task, items, instructions, hits)

    def answer(self, asked: AskedTask, steering: tasks.Steering | None = None) -> Answers:
        """What the decoder answers to the items of a task; `steering` is of pictures."""
        return sample_answers(
            self._generator, asked.instructions, self.sampling, self.seed, steering
        )

    def score(self, asked: AskedTask, answers: Answers) -> dict[str, list[int]]:
        """The scores of each answer, 0 or 1, by name."""
        outputs = as_outputs(self.scenes.image_tokenizer, answers)
        scores = asked.task.scene_task.score([each.task_item for each in asked.items], outputs)
        return {key: [int(each[key]) for each in scores] for key in scores[0]}


def word(
    generator: tasks.Generator, item: CodedItem, documents: Sequence[token_documents.Example]
) -> Instruction:
    """An item in the first wording of its task."""
    return instruction_items.instruct(
        generator.vocabulary,
        instruction_templates.TEMPLATES[item.task][0],
        item,
        generator.layout.max_text_len,
        documents,
    )


def answer(
    generator: tasks.Generator,
    image_tokenizer: frozen.FrozenTokenizer,
    asked: Sequence[Instruction],
    sampling: Sampling,
    seed: int,
) -> list[Output]:
    """What a decoder answers to instructions of one task: pictures, sampled, or the likeliest texts."""
    return as_outputs(image_tokenizer, sample_answers(generator, asked, sampling, seed))


def sample_answers(
    generator: tasks.Generator,
    asked: Sequence[Instruction],
    sampling: Sampling,
    seed: int,
    steering: tasks.Steering | None = None,
) -> Answers:
    """The answers of `answer`, with codes for pictures, whose sampling may be steered."""
    seeds = tasks.make_seeds(seed, len(asked))
    if asked[0].answer is not None:
        texts, _ = instruction_answers.generate_answers(generator, asked, seeds, Sampling(0.0))
        return texts
    sampled = tasks.generate_codes(
        generator,
        [each.main.text for each in asked],
        [each.docs for each in asked],
        seeds,
        sampling,
        steering=steering,
    )
    codes: list[list[int]] = sampled.codes.tolist()
    return codes


def as_outputs(image_tokenizer: frozen.FrozenTokenizer, answers: Answers) -> list[Output]:
    """Answers as the segments that scene tasks score."""
    texts = [each for each in answers if isinstance(each, str)]
    if texts:
        return [(Text(text),) for text in texts]
    return [(Image(pixels),) for pixels in image_tokenizer.decode(np.array(answers, np.int32))]
