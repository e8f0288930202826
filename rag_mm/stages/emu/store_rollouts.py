"""Stage `rollouts`: the codes that Emu regresses from every training caption, computed once and stored.

A rollout has no randomness, so that what the paper computes in every step of the visual decoder's training is
the same each time. With the rollout of the empty prompt, which stands for a condition that is left out.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.data.interleaved import Parts
from rag_mm.stages.emu import album, prepare_data, saved_emu
from rag_mm.stages.emu.album import PictureArrays
from rag_mm.stages.emu.prepare_data import EmuDataStageConfig
from rag_mm.stages.emu.training_documents import TrainingDocuments
from rag_mm.stages.shared import world_config

INPUTS = ("emu_data", "emu")
NONE, RETRIEVED = "none", "retrieved"
NULL = "null.npy"


@dataclasses.dataclass(frozen=True)
class RolloutsStageConfig:
    """Which prompts are rolled out.

    Attributes:
        seed: unused; rollouts are the same for the same model.
        world: world of the documents.
        emu_data: the config of the stage that prepares the data.
        has_documents: whether every caption is also rolled out after the document that it retrieves first.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    emu_data: EmuDataStageConfig
    has_documents: bool = True


def inputs(config: RolloutsStageConfig) -> tuple[str, ...]:
    """The further stages that it reads with this config."""
    return ("neighbors",) if config.has_documents else ()


def run(config: RolloutsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Writes `none/*.npy`, and `retrieved/*.npy` after documents, float16 [.., N, R] of the training pairs.

    Files that are there already are kept. `null.npy` float32 [N, R] is the rollout of the empty prompt.

    Returns:
        The numbers of captions and of those after a document.
    """
    documents = config.emu_data.collect(run)
    emu = saved_emu.load(run.finished_stage("emu"))
    pictures = prepare_data.load_pictures(run, documents.album)
    captions: list[Parts] = [pair[:1] for pair in documents.pairs]
    prompts = {NONE: captions}
    if config.has_documents:
        found = _retrieved(run, documents)
        both = zip(found, captions, strict=True)
        prompts[RETRIEVED] = [(*before, *caption) for before, caption in both]
    for name, each in prompts.items():
        make = functools.partial(_roll_out, emu, pictures, each)
        album.write_arrays(f"rollouts, {name}", len(each), stage_dir / name, make)
    files.write_array(stage_dir / NULL, roll_out_nothing(emu))
    num_after = sum(len(each) > 1 for each in prompts.get(RETRIEVED, []))
    return {"captions": len(captions), "after_documents": num_after}


def roll_out_nothing(emu: saved_emu.LoadedEmu) -> np.ndarray:
    """The codes float32 [N, R] of the image that follows the empty prompt."""
    config = emu.config
    return emu.roll_out([()], np.zeros((0, config.num_slots, config.decoder.embed_dim)))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredRollouts:
    """Rollouts of the training captions.

    Attributes:
        by_documents: by what stands before a caption, `none` or `retrieved`, codes [N, R] of each caption.
        null: float32 [N, R], of the empty prompt.
    """

    by_documents: Mapping[str, PictureArrays]
    null: np.ndarray


def open_rollouts(run: run_folder.Run) -> StoredRollouts:
    """The rollouts of a run; raises UserError if the stage is unfinished or edited."""
    folder = run.finished_stage("rollouts")
    names = [name for name in (NONE, RETRIEVED) if (folder / name).exists()]
    opened = {name: PictureArrays.open(folder / name) for name in names}
    return StoredRollouts(opened, files.read_array(folder / NULL))


def _retrieved(run: run_folder.Run, documents: TrainingDocuments) -> list[Parts]:
    """The document that the first caption of each pair retrieves; () where there is none."""
    neighbors = files.read_array(run.finished_stage("neighbors") / "train.npy")
    return [documents.memory[row] if row >= 0 else () for row in neighbors[:, 0, 0].tolist()]


def _roll_out(
    emu: saved_emu.LoadedEmu, pictures: PictureArrays, prompts: Sequence[Parts], numbers: range
) -> np.ndarray:
    """The codes float16 [B, N, R] of the prompts of these numbers, whose images are numbers of pictures."""
    chosen = [prompts[number] for number in numbers]
    shown = sorted({part for parts in chosen for part in parts if isinstance(part, int)})
    vectors = roll_vectors(emu, pictures, shown)
    place = {number: i for i, number in enumerate(shown)}
    renumbered: list[Parts] = [
        tuple(place[part] if isinstance(part, int) else part for part in parts) for parts in chosen
    ]
    return emu.roll_out(renumbered, vectors).astype(np.float16)


def roll_vectors(
    emu: saved_emu.LoadedEmu, pictures: PictureArrays, numbers: Sequence[int]
) -> np.ndarray:
    """The decoder's inputs float32 [P, N, D] for pictures, by their numbers."""
    if not numbers:
        return np.zeros((0, emu.config.num_slots, emu.config.decoder.embed_dim), np.float32)
    return emu.vectors(emu.codes(pictures.take(np.array(numbers))))
