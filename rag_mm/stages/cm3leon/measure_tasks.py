"""Measures decoders on instructions about test scenes of held-out classes; every task has its own file."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, progress, run_folder
from rag_mm.core.document_types import Image, Text
from rag_mm.core.errors import UserError
from rag_mm.data import instruction_items, instruction_templates, token_documents
from rag_mm.data.instruction_items import CodedItem, Instruction
from rag_mm.data.sequences import Layout
from rag_mm.decode import instruction_answers, tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.eval import statistics
from rag_mm.stages.cm3leon import instruction_sequences
from rag_mm.stages.cm3leon.scene_instructions import InstructionTask, SceneInstructions, SceneItem
from rag_mm.stages.ra_cm3 import generate_samples, train_decoder
from rag_mm.stages.shared import build_memory, coded_corpus, find_neighbors, frozen, world_config
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.worlds.emoji.scene_tasks import Output

SPLIT = "held_out"
FOLDER = "tasks"


@dataclasses.dataclass(frozen=True, eq=False)
class AskedScenes:
    """The test scenes of a run and the documents that the run retrieved for them.

    Attributes:
        run: the run, whose stage `neighbors` chose the scenes.
        world: world of the scenes.
        image_tokenizer: the run's.
        num_test: number of scenes, at most.
    """

    run: run_folder.Run
    world: world_config.EmojiWorld
    image_tokenizer: frozen.FrozenTokenizer
    num_test: int

    @functools.cached_property
    def _neighbors(self) -> dict[str, np.ndarray]:
        return generate_samples.load_neighbors(self.run, SPLIT, self.num_test)

    def memory(self, layout: Layout) -> list[token_documents.Example]:
        """The documents that may be read."""
        corpus = coded_corpus.Corpus(layout, self.image_tokenizer)
        return corpus.memory(build_memory.open_memory(self.run))

    def items(self, task: InstructionTask) -> tuple[list[SceneItem], list[int]]:
        """The items of a task, and which of the test scenes each is about."""
        scenes = self.world.scenes("test", *find_neighbors.TEST_SPLITS[SPLIT])
        instructions = SceneInstructions(task, scenes)
        numbers = {scene: number for number, scene in enumerate(instructions.scenes)}
        rows = enumerate(self._neighbors["rows"].tolist())
        chosen = [(place, numbers[row]) for place, row in rows if row in numbers]
        return [instructions[number] for _, number in chosen], [place for place, _ in chosen]

    def hits(self, task: InstructionTask, max_docs: int) -> np.ndarray:
        """Memory rows for each test scene, int32 [Q, K], best first, -1 for a missing one."""
        count = max_docs if task.num_docs is None else task.num_docs
        return self._neighbors["image" if task.wants_text else "text"][:, :count]


def measure(
    scenes: AskedScenes,
    decoders: Mapping[str, epath.Path],
    chosen: Sequence[InstructionTask],
    folder: epath.Path,
    sampling: Sampling,
    seed: int,
) -> dict[str, Any]:
    """Scores decoders on the same items of every task.

    Writes `tasks/DECODER_TASK.json` with the scores of each item, from which an interrupted measurement goes
    on, and `per_document.json`.

    Args:
        scenes: what is asked about.
        decoders: folders of stages that trained a decoder, by name.
        chosen: the tasks.
        folder: receives the files.
        sampling: of image codes; answers are the likeliest.
        seed: of sampling.

    Returns:
        {"tasks": {decoder: {task: {score: {"accuracy", "ci95", "n"}}}}}; a score is of the scene task.
    """
    values: dict[str, dict[str, list[int]]] = {}
    summary: dict[str, dict[str, Any]] = {name: {} for name in decoders}
    (folder / FOLDER).mkdir(exist_ok=True)
    with progress.track(FOLDER, total=len(decoders) * len(chosen)) as bar:
        for name, stage_dir in decoders.items():
            scorer = TaskScorer(scenes, stage_dir, sampling, seed)
            for task in chosen:
                path = folder / FOLDER / f"{name}_{task.name}.json"
                if not path.exists():
                    files.write_json(path, scorer.score(task))
                scores = files.read_object(path)
                values[f"{name}_{task.name}"] = scores
                summary[name][task.name] = {
                    key: statistics.accuracy(each, f"{task.name} {key}")
                    for key, each in scores.items()
                }
                bar.update(len(values))
    files.write_json(folder / PER_DOCUMENT, {SPLIT: values})
    return {"tasks": summary}


@dataclasses.dataclass(frozen=True, eq=False)
class TaskScorer:
    """One decoder on test scenes; it is loaded when the first task is scored.

    Attributes:
        scenes: what is asked about.
        stage_dir: of the stage that trained the decoder.
        sampling: of image codes; answers are the likeliest.
        seed: of sampling.
    """

    scenes: AskedScenes
    stage_dir: epath.Path
    sampling: Sampling
    seed: int

    @functools.cached_property
    def _generator(self) -> tasks.Generator:
        return train_decoder.load_params(self.stage_dir, self.scenes.image_tokenizer)

    @functools.cached_property
    def _memory(self) -> list[token_documents.Example]:
        return self.scenes.memory(self._generator.layout)

    def score(self, task: InstructionTask) -> dict[str, list[int]]:
        """The scores of each item of a task, 0 or 1, by name; UserError if no test scene has an item."""
        items, places = self.scenes.items(task)
        if not items:
            raise UserError(
                f"None of the {self.scenes.num_test} test scenes has an item of the task {task.name}; raise "
                "num_test, or measure another task."
            )
        hits = self.scenes.hits(task, self._generator.layout.max_docs)
        docs = [coded_corpus.pick(self._memory, hits[place]) for place in places]
        tokenizer = self.scenes.image_tokenizer
        coded = instruction_sequences.encode(
            (each.item for each in items), tokenizer.encode, tokenizer.image_size
        )
        asked = [
            word(self._generator, item, documents)
            for item, documents in zip(coded, docs, strict=True)
        ]
        outputs = answer(self._generator, tokenizer, asked, self.sampling, self.seed)
        scores = task.scene_task.score([each.task_item for each in items], outputs)
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
    seeds = tasks.make_seeds(seed, len(asked))
    if asked[0].answer is not None:
        texts = instruction_answers.generate_answers(generator, asked, seeds, Sampling(0.0))
        return [(Text(text),) for text in texts]
    sampled = tasks.generate_codes(
        generator,
        [each.main.text for each in asked],
        [each.docs for each in asked],
        seeds,
        sampling,
    )
    return [(Image(pixels),) for pixels in image_tokenizer.decode(sampled.codes)]
