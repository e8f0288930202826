"""Stage `emu_sft`: tunes a trained Emu on instructions by updates of low rank (docs/papers/emu.md).

All of the stage `emu`'s model stays as it is; the decoder's self-attention gets updates, and the loss is the
cross-entropy of answers alone. Then questions about test scenes are asked before and after, and with examples
in context.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import checks, files, progress, run_folder, sharding
from rag_mm.data import interleaved
from rag_mm.models.emu import emu_objective
from rag_mm.nn import lora, param_trees
from rag_mm.nn.lora import LoRAConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.emu import (
    answer_figures,
    dialogue_rows,
    kept_figures,
    saved_emu,
    tested_scenes,
    tuned_emu,
)
from rag_mm.stages.emu.album import Album
from rag_mm.stages.emu.answer_figures import Asked
from rag_mm.stages.emu.dialogue_rows import DialogueConfig, DialogueSource
from rag_mm.stages.emu.row_maker import RowSize
from rag_mm.stages.emu.saved_emu import LoadedEmu
from rag_mm.stages.emu.tested_scenes import EncodedPictures
from rag_mm.stages.shared import build_memory, train_retriever, world_config
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.train import checkpoint, loop, optimizer

INPUTS = ("retriever", "memory", "neighbors", "emu")
UNTUNED, TUNED = "untuned", "tuned"
_ANSWERS = "answers.json"


@dataclasses.dataclass(frozen=True)
class EmuTuningStageConfig:
    """The dialogues, and how an Emu is tuned on them.

    Attributes:
        seed: seed of the updates, the order of dialogues and the random choices in them.
        world: world of the scenes.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        lora: the updates; their targets are named from the whole model's paths, such as `decoder/*/q`.
        dialogues: what is asked.
        batch_size: rows per step, each as long as the model's longest sequence.
        num_test: test scenes, of test classes and of seen ones, that are asked about; 0 measures nothing.
        num_few_shot: of these, how many are asked about after examples.
        shots: numbers of examples, chosen by RICES or at random.
        scale: devices, precision, and what is computed in parts.
    """

    seed: int
    world: world_config.EmojiWorld
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    lora: LoRAConfig = tuned_emu.PAPER_LORA
    dialogues: DialogueConfig = dataclasses.field(default_factory=DialogueConfig)
    batch_size: int = 8
    num_test: int = 192
    num_few_shot: int = 96
    shots: tuple[int, ...] = (0, 1, 2, 4)
    scale: scaling.DecoderScaleConfig = dataclasses.field(
        default_factory=scaling.DecoderScaleConfig
    )

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.at_least(self, 0, "num_test", "num_few_shot")
        if 1 in (self.num_test, self.num_few_shot):
            raise ValueError(
                "num_test and num_few_shot cannot be 1: an interval needs 2, and 0 measures nothing"
            )
        if min(self.shots, default=0) < 0:
            raise ValueError(f"shots are {self.shots}; give numbers of at least 0")


def make_mesh(config: EmuTuningStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def run(config: EmuTuningStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
    """Tunes the model, writes the updates (`tuned_emu`) and measures answers.

    Writes the answers of each split, and `per_document.json`.

    Returns:
        `train`, the last logged metrics; `num_updates`, the number of trained parameters; `captions`, the
        mean NLL of full captions without the updates, before and after, whether they have the same bits
        (`is_unchanged`), and with the updates; by split what is right, by task and variant. {} in followers.
    """
    folder = run.finished_stage("emu")
    base, encoder = saved_emu.load(folder), train_retriever.load_encoder(run.workdir)
    emu = tuned_emu.with_marks(base)
    size = RowSize(config.batch_size, base.config.decoder.max_seq_len, config.dialogues.max_images)
    source = dialogue_rows.open_source(config.dialogues, config.world, run, encoder, emu, size)
    params, log = _train(config, stage_dir, emu, folder, source)
    tuned_emu.save(
        stage_dir, params, config.lora, config.dialogues.system, multiprocess.is_leader()
    )
    if not multiprocess.is_leader():
        return {}
    updates = param_trees.split(params, lora.is_added)[0]
    train = {key: value for key, value in log[-1].items() if key != "step"}
    result = {
        "train": train,
        "num_updates": sum(leaf.size for leaf in jax.tree.leaves(updates)),
    }
    if not config.num_test:
        return result
    pictures = EncodedPictures(Album(), encoder, base)
    return result | _Measurement(config, run, stage_dir, pictures).measure()


def _train(
    config: EmuTuningStageConfig,
    stage_dir: epath.Path,
    emu: LoadedEmu,
    folder: epath.Path,
    source: DialogueSource,
) -> tuple[Params, list[dict[str, float]]]:
    mesh, scale = make_mesh(config), config.scale
    decoder = dataclasses.replace(emu.config.decoder, dtype=scale.dtype, remat=scale.remat)
    model = dataclasses.replace(emu.config, decoder=decoder, loss_chunks=scale.loss_chunks)
    return training.train(
        stage_dir.name,
        stage_dir,
        functools.partial(tuned_emu.make_model, model, config.lora, config.seed),
        lora.with_dropout(emu_objective.answer_loss),
        source.batches(
            config.seed, sharding.local_rows(config.batch_size, mesh), scale.num_workers
        ),
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        num_parts=scale.num_parts,
        start=lambda abstract: checkpoint.load_params(
            folder / saved_emu.PARAMS, param_trees.split(abstract, lora.is_added)[1]
        ),
        prepare=lambda params: tuned_emu.add_roles(params, emu.maker.marks, emu.vocabulary),
        what=training.WhatTrains(lambda path: not lora.is_added(path)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Measurement:
    """Measures the model with and without the updates; finished parts are kept."""

    config: EmuTuningStageConfig
    run: run_folder.Run
    stage_dir: epath.Path
    pictures: EncodedPictures

    def measure(self) -> dict[str, Any]:
        """Everything; see `run`."""
        parts: dict[str, Callable[[], Mapping[str, Any]]] = {
            split: functools.partial(self.answers, split) for split in tested_scenes.SPLITS
        }
        if self.config.num_few_shot and self.config.shots:
            parts |= {
                f"few_shot_{name}": functools.partial(self.few_shot, name)
                for name in (UNTUNED, TUNED)
            }
        found: dict[str, Mapping[str, Any]] = {}
        with progress.track("emu_sft", len(parts) + 1) as bar:
            for number, (name, make) in enumerate(parts.items(), 1):
                path = self.stage_dir / f"part_{name}.json"
                found[name] = kept_figures.once(path, make)
                bar.update(number)
            captions = kept_figures.once(self.stage_dir / "part_captions.json", self.captions)
            bar.update(len(parts) + 1)
        files.write_json(self.stage_dir / PER_DOCUMENT, found)
        most = max(self.config.shots, default=0)
        pairs = [
            (figure, ours, theirs)
            for task in self._tasks
            for figure in (task.name, f"{task.name}_nll")
            for ours, theirs in (
                (TUNED, UNTUNED),
                (f"{TUNED}_retrieved", f"{UNTUNED}_retrieved"),
                (f"{TUNED}_retrieved", TUNED),
                (f"{answer_figures.RICES}_{most}", f"{answer_figures.RANDOM}_{most}"),
                (f"{answer_figures.RICES}_{most}", "none"),
            )
        ]
        shares = answer_figures.shares(self._tasks)
        return {"captions": dict(captions)} | {
            name: kept_figures.summary(values, shares, pairs) for name, values in found.items()
        }

    def answers(self, split: str) -> dict[str, Any]:
        """Questions about the test scenes of a split; writes the answers."""
        tested = self._tested(split, self.config.num_test)
        values, written = answer_figures.ask(self._asked, self.pictures, tested, self._tasks)
        files.write_json(self.stage_dir / f"{split}_{_ANSWERS}", written)
        return kept_figures.lists(values)

    def few_shot(self, name: str) -> dict[str, Any]:
        """Questions about test scenes of held-out classes after examples."""
        config, tested = self.config, self._tested("held_out", self.config.num_few_shot)
        memory = build_memory.open_memory(self.run)
        most = max(config.shots)
        examples = answer_figures.choose(memory, config.world, tested, most, config.seed)
        return kept_figures.lists(
            answer_figures.few_shot(
                self._asked[name], self.pictures, tested, self._tasks, config.shots, examples
            )
        )

    def captions(self) -> dict[str, Any]:
        """Mean NLL of full captions in nats: of the model as it was, as it is on the disk, and tuned."""
        tested = self._tested("held_out", self.config.num_test)
        mains = [interleaved.images_first(pair) for pair in tested.pairs]
        nothing, vectors = [()] * len(mains), self.pictures.vectors
        nll = lambda emu: emu.text_nll(nothing, mains, vectors)
        before = nll(self.pictures.emu)
        after = nll(saved_emu.load(self.run.finished_stage("emu")))
        return {
            "before": float(before.mean()),
            "adapter_off": float(after.mean()),
            "is_unchanged": bool(np.array_equal(before, after)),
            "adapter_on": float(nll(self._asked[TUNED].emu).mean()),
        }

    @functools.cached_property
    def _asked(self) -> dict[str, Asked]:
        base = self.pictures.emu
        tuned = tuned_emu.load(self.stage_dir, base)
        return {
            UNTUNED: Asked(base, answer_figures.plainly, False),
            TUNED: Asked(tuned.emu, tuned.prompt, True),
        }

    @property
    def _tasks(self) -> list[Any]:
        return dialogue_rows.find(self.config.dialogues.tasks)

    def _tested(self, split: str, count: int) -> tested_scenes.TestedScenes:
        config, album = self.config, self.pictures.album
        return tested_scenes.open_scenes(config.world, self.run, album, split, count, config.seed)
