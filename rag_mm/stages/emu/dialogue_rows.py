"""Emu's sequences for instruction tuning: dialogues about scenes, after retrieved documents or none."""

import dataclasses
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from rag_mm.core import checks, files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import interleaved
from rag_mm.data.interleaved import Part, Parts
from rag_mm.stages.emu import tested_scenes, training_documents
from rag_mm.stages.emu.album import Album
from rag_mm.stages.emu.row_maker import RowMaker, RowSize, pack_rows
from rag_mm.stages.emu.saved_emu import LoadedEmu
from rag_mm.stages.shared import frozen, world_config
from rag_mm.worlds.emoji import scene_captions, scene_questions, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Scenes
from rag_mm.worlds.emoji.scene_tasks import SceneTask, TaskItem

TASKS = {
    task.name: task
    for task in (
        scene_captions.CAPTION,
        scene_questions.WHAT,
        scene_questions.WHERE,
        scene_questions.WHICH_COLOR,
        scene_questions.HOW_MANY,
    )
}
"""What may be asked about a scene, by name."""


@dataclasses.dataclass(frozen=True)
class DialogueConfig:
    """What dialogues are made of.

    Attributes:
        tasks: what is asked, of `caption`, `what`, `where`, `which_color` and `how_many`.
        num_scenes: training scenes of seen classes that dialogues are about.
        max_turns: most questions about a scene in one dialogue; each number up to it is as frequent.
        num_docs_weights: relative frequencies of dialogues after 0, 1, .. documents that the scene's image
            retrieved.
        system: what a dialogue begins with, such as what the assistant is told about images.
        max_images: images in a row, into which several dialogues are packed.
    """

    tasks: tuple[str, ...] = ("caption", "what", "where", "which_color")
    num_scenes: int = 8000
    max_turns: int = 2
    num_docs_weights: tuple[float, ...] = (0.5, 0.5)
    system: str = ""
    max_images: int = 8

    def __post_init__(self):
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks are {self.tasks}; choose from {', '.join(TASKS)}")
        checks.at_least(self, 1, "num_scenes", "max_turns", "max_images")
        weights = self.num_docs_weights
        if not weights or min(weights) < 0 or not sum(weights):
            raise ValueError(f"num_docs_weights are {weights}; give at least 0, not all 0")


@dataclasses.dataclass(frozen=True, eq=False)
class DialogueSource:
    """Draws dialogues.

    Attributes:
        config: what they are made of.
        scenes: the training scenes,
        rows: int64 [S], and those that dialogues are about.
        numbers: int64 [S], the picture of each.
        neighbors: int32 [S, K], rows of the memory that its image retrieved, -1 for a missing one.
        memory: the parts of these rows, image first.
        maker: makes sequences.
        vectors: float [P, N, D], the decoder's inputs for each picture.
        size: of a batch.
    """

    config: DialogueConfig
    scenes: Scenes
    rows: np.ndarray
    numbers: np.ndarray
    neighbors: np.ndarray
    memory: Mapping[int, Parts]
    maker: RowMaker
    vectors: np.ndarray
    size: RowSize

    def make(self, index: np.int64, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One dialogue about scene `index`, as `RowMaker.dialogue` returns it."""
        scene, level = int(self.rows[index]), self.scenes.levels[int(self.rows[index])]
        tasks = [task for name in self.config.tasks if (task := TASKS[name]).is_defined(level)]
        count = int(rng.integers(1, self.config.max_turns + 1))
        turns: list[tuple[Parts, str | None]] = []
        for place in rng.permutation(len(tasks))[:count]:
            asked = tasks[place].make(self.scenes, scene, rng)
            picture = () if turns else (int(self.numbers[index]),)
            turns.append(((*picture, question_of(asked)), answer_of(asked)))
        weights = np.asarray(self.config.num_docs_weights)
        num_docs = int(rng.choice(len(weights), p=weights / weights.sum()))
        found = self.neighbors[index]
        documents = [self.memory[row] for row in rng.permutation(found[found >= 0])[:num_docs]]
        while documents and not self._fits(_after(documents, self._parts(turns))):
            documents = documents[1:]
        while len(turns) > 1 and not self._fits(self._parts(turns)):
            turns = turns[:-1]
        parts = _after(documents, self._parts(turns))
        if not self._fits(parts):
            raise UserError(
                f"A question and its answer do not fit a row: they have {self.maker.length(parts)} tokens; "
                "raise emu.sequences.max_seq_len or shorten dialogues.system."
            )
        return self.maker.dialogue(parts)

    def batches(
        self, seed: int, rows: range | None = None, num_workers: int = 0
    ) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Endless batches, of the keys that `models.emu.emu_objective.answer_loss` reads."""
        numbers = np.arange(len(self.rows))
        take = {"vectors": self._take}
        return pack_rows(numbers, self.make, self.maker, self.size, take, seed, rows, num_workers)

    def _parts(self, turns: Sequence[tuple[Parts, str | None]]) -> Parts:
        return interleaved.dialogue(turns, self.config.system)

    def _fits(self, parts: Parts) -> bool:
        is_short = self.maker.length(parts) <= self.size.max_seq_len
        return is_short and sum(isinstance(part, int) for part in parts) <= self.size.max_images

    def _take(self, pictures: np.ndarray) -> np.ndarray:
        """The vectors of pictures int [B, I], zeros for -1."""
        return np.where(pictures[:, :, None, None] >= 0, self.vectors[pictures], 0)


def open_source(
    config: DialogueConfig,
    world: world_config.EmojiWorld,
    run: run_folder.Run,
    encoder: frozen.FrozenRetriever,
    emu: LoadedEmu,
    size: RowSize,
) -> DialogueSource:
    """The dialogues about training scenes of a run, whose pictures are encoded here, once.

    Args:
        config: what they are made of.
        world: world of the scenes, of whose documents the run's memory is made.
        run: whose stage `neighbors` retrieved for these scenes.
        encoder: the frozen tower.
        emu: the model, with marks.
        size: of a batch.
    """
    scenes = world.scenes("train", *world_config.SEEN)
    rows = world_config.evenly_spaced(np.arange(len(scenes)), config.num_scenes)
    neighbors = files.read_array(run.finished_stage("neighbors") / "train.npy")[rows, -1]
    album, memory = Album(), world.scenes("memory", *world_config.SEEN)
    numbers = [
        training_documents.scene_number(album, scenes.facts(row), scenes.levels[row])
        for row in rows.tolist()
    ]
    documents = {
        row: interleaved.images_first(training_documents.scene_row(album, memory, row))
        for row in np.unique(neighbors[neighbors >= 0]).tolist()
    }
    vectors = tested_scenes.EncodedPictures(album, encoder, emu).vectors.astype(np.float16)
    return DialogueSource(
        config,
        scenes,
        rows,
        np.array(numbers),
        neighbors,
        documents,
        emu.maker,
        vectors,
        size,
    )


def question_of(item: TaskItem) -> str:
    """The words in which an item asks."""
    return scene_tasks.text_of(item.prompt)


def answer_of(item: TaskItem) -> str:
    """The first of the accepted answers."""
    return scene_tasks.text_of(item.target)


def find(names: Sequence[str]) -> list[SceneTask]:
    """The tasks of these names."""
    return [TASKS[name] for name in names]


def _after(documents: Sequence[Parts], parts: Parts) -> Parts:
    joined: list[Part] = [part for document in documents for part in document]
    return (*joined, *parts)
