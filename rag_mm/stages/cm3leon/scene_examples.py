"""The examples that a decoder is tuned on: instructions about training scenes, with their documents."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from rag_mm.core import files, progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data.token_documents import Example
from rag_mm.stages.cm3leon import instruction_sequences, scene_instructions
from rag_mm.stages.cm3leon.instruction_sequences import TaskData
from rag_mm.stages.cm3leon.scene_instructions import InstructionTask, SceneInstructions
from rag_mm.stages.shared import build_memory, coded_corpus, world_config
from rag_mm.worlds.emoji.emoji_scenes import Scenes


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingScenes:
    """Training scenes of seen classes, and what the run retrieved for them.

    Attributes:
        scenes: the scenes.
        neighbors: memory rows for each caption of a scene and for its image, int32 [R, captions + 1, K].
        memory: the documents of seen classes.
        corpus: layout and image tokenizer.
        seed: of the choice of scenes and of documents.
    """

    scenes: Scenes
    neighbors: np.ndarray
    memory: list[Example]
    corpus: coded_corpus.Corpus
    seed: int

    def examples(self, task: InstructionTask, count: int) -> TaskData:
        """`count` examples of a task, no two alike; all scenes come once before any comes again.

        Their share is 0, and they have the documents but no weights of their numbers.

        Raises:
            UserError: the task is not defined for the scenes.
        """
        num_scenes = len(SceneInstructions(task, self.scenes).scenes)
        num_variants = math.ceil(count / num_scenes)
        instructions = SceneInstructions(task, self.scenes, num_variants)
        rng = np.random.default_rng((self.seed, 7, *task.name.encode()))
        whole = (num_variants - 1) * num_scenes
        rest = whole + rng.permutation(num_scenes)[: count - whole]
        made = [instructions[int(number)] for number in [*range(whole), *rest]]
        tokenizer = self.corpus.image_tokenizer
        items = instruction_sequences.encode(
            (each.item for each in made), tokenizer.encode, tokenizer.image_size
        )
        documents = [self._documents(task, each.scene, rng) for each in made]
        return TaskData(list(items), documents, (1.0,), 0.0)

    def _documents(self, task: InstructionTask, scene: int, rng: np.random.Generator) -> np.ndarray:
        """Found by the image where that is asked about, else by a caption or the image, as in pretraining."""
        found = self.neighbors[scene]
        by_image = task.wants_text or rng.random() < 0.5
        return found[-1] if by_image else found[int(rng.integers(len(found) - 1))]


def open_scenes(
    run: run_folder.Run, world: world_config.EmojiWorld, corpus: coded_corpus.Corpus, seed: int
) -> TrainingScenes:
    """The training scenes of a run.

    Raises:
        UserError: a stage is missing or unfinished, or retrieved for another world.
    """
    scenes = world.scenes("train", *world_config.SEEN)
    neighbors = files.read_array(run.finished_stage("neighbors") / "train.npy")
    if len(neighbors) != len(scenes):
        raise UserError(
            f"The stage neighbors retrieved for {len(neighbors)} scenes, but there are {len(scenes)}; make "
            "it of this world."
        )
    # Training must not read documents of held-out classes, which come last in the memory.
    num_seen = len(build_memory.open_memory(run, build_memory.SEEN_VERSION))
    memory = corpus.memory(build_memory.open_memory(run))[:num_seen]
    return TrainingScenes(scenes, neighbors, memory, corpus, seed)


def make_examples(
    scenes: TrainingScenes,
    counts: Mapping[str, int],
    shares: Mapping[str, float],
    num_docs_weights: tuple[float, ...],
) -> dict[str, TaskData]:
    """The examples of every task, by its name.

    Args:
        scenes: what they are about.
        counts: how many there are of each task.
        shares: the share of each task among the sequences.
        num_docs_weights: relative frequencies of 0, 1, .. documents of tasks that read any number.

    Raises:
        UserError: a task needs more documents than the decoder reads, or is not defined for the scenes.
    """
    tasks = {}
    max_docs = scenes.corpus.layout.max_docs
    with progress.track("examples", total=len(counts)) as bar:
        for name, count in counts.items():
            task = scene_instructions.find(name)
            weights = weights_of(task, num_docs_weights, max_docs)
            tasks[name] = dataclasses.replace(
                scenes.examples(task, count), num_docs_weights=weights, share=shares[name]
            )
            bar.update(len(tasks))
    return tasks


def weights_of(
    task: InstructionTask, num_docs_weights: tuple[float, ...], max_docs: int
) -> tuple[float, ...]:
    """Relative frequencies of 0, 1, .. retrieved documents of a task.

    Raises:
        UserError: with the given pictures they are more documents than the decoder reads.
    """
    weights = num_docs_weights if task.num_docs is None else (*[0.0] * task.num_docs, 1.0)
    most = task.num_given + len(weights) - 1
    if most > max_docs:
        raise UserError(
            f"The task {task.name} puts {most} documents before the main one, but the decoder reads at most "
            f"{max_docs}; train one that reads more, or leave the task out."
        )
    return weights
