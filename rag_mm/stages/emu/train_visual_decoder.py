"""Stage `visual_decoder`: trains a diffusion model that draws an image from its codes.

Emu trains it on what its decoder regresses from captions, the rollouts that the stage `rollouts` has stored;
Emu2 on the codes of its encoder. The stage `visual_control` is the other one of the two, for comparison.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import checks, configuration, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.eval import scene_accuracy
from rag_mm.models.emu import visual_decoder
from rag_mm.models.emu.visual_decoder import VisualDecoderConfig
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.emu import prepare_data, saved_emu, saved_visual, store_rollouts
from rag_mm.stages.emu.prepare_data import EmuDataStageConfig
from rag_mm.stages.emu.saved_visual import LoadedVisualDecoder
from rag_mm.stages.emu.training_documents import TrainingDocuments
from rag_mm.stages.shared import frozen, world_config
from rag_mm.train import loop, optimizer
from rag_mm.worlds.emoji import scene_facts
from rag_mm.worlds.emoji.emoji_scenes import Scenes

INPUTS = ("emu_data", "emu", "rollouts")
CONDITIONS = ("rollouts", "embeddings")


@dataclasses.dataclass(frozen=True)
class VisualDecoderStageConfig:
    """Model, data and training of a visual decoder.

    Attributes:
        seed: seed of the initial weights, the order of pairs and the noise.
        world: world of the documents.
        emu_data: the config of the stage that prepares the data.
        model: a `VisualDecoderConfig` without the sizes of its conditions, which are Emu's.
        optimizer: learning rate, schedule, moments and moving averages.
        loop: number of steps, logging and checkpoints.
        condition: rollouts: what Emu regresses from the captions, with and without documents in turn; or
            embeddings, the codes of the images themselves.
        batch_size: images per step.
        num_watched: test documents of seen classes whose captions are drawn at every checkpoint, by a single
            process.
        scale: devices, and what is computed in parts.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    emu_data: EmuDataStageConfig
    model: Mapping[str, Any] = dataclasses.field(
        metadata=configuration.part_of(VisualDecoderConfig, ("num_slots", "condition_dim"))
    )
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    condition: str = "rollouts"
    batch_size: int = 64
    num_watched: int = 64
    scale: scaling.VisualScaleConfig = dataclasses.field(default_factory=scaling.VisualScaleConfig)

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.one_of(self, "condition", CONDITIONS)
        checks.at_least(self, 2, "num_watched")
        model = self.model_config((1, 1))
        if model.vae is not None:
            raise ValueError(
                "model.vae is an autoencoder that must be trained before; leave it out, and pixels are drawn"
            )
        size = model.image_size
        if size != self.world.image_size:
            raise ValueError(
                f"the network's image_size is {size}, but the world's images have "
                f"{self.world.image_size} pixels a side; make them agree"
            )

    def model_config(self, shape: tuple[int, ...]) -> VisualDecoderConfig:
        """The model's config for codes of a shape (N, R)."""
        sizes = dict(num_slots=shape[0], condition_dim=shape[1])
        return configuration.make(VisualDecoderConfig, {**self.model, **sizes}, "model")


def make_mesh(config: VisualDecoderStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def run(config: VisualDecoderStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains the model and writes it (`saved_visual`).

    Returns:
        `train`, the last logged metrics, and `num_params`; {} in followers.
    """
    documents = config.emu_data.collect(run)
    emu = saved_emu.load(run.finished_stage("emu"))
    stored = store_rollouts.open_rollouts(run)
    take, sample, num_records = _training_data(config, run, documents, emu, stored)
    model_config, mesh = config.model_config(stored.null.shape), make_mesh(config)
    make = partial(saved_visual.make_model, model_config, config.seed)
    params, log = training.train(
        stage_dir.name,
        stage_dir,
        make,
        visual_decoder.loss_fn,
        pipeline.make_array_batches(
            num_records,
            config.batch_size,
            config.seed,
            take,
            sharding.local_rows(config.batch_size, mesh),
        ),
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        num_parts=config.scale.num_parts,
        prepare=lambda params: visual_decoder.fit(params, sample, stored.null),
        what=training.WhatTrains(visual_decoder.is_fitted),
        watch=None if multiprocess.has_others() else _make_watch(config, emu, model_config),
    )
    saved_visual.save(stage_dir, model_config, params, multiprocess.is_leader())
    if not multiprocess.is_leader():
        return {}
    train = {key: value for key, value in log[-1].items() if key != "step"}
    return {"train": train, "num_params": sum(leaf.size for leaf in jax.tree.leaves(params))}


# Record numbers, int64 [B] -> a batch of `visual_decoder.loss_fn`.
_Take = Callable[[np.ndarray], dict[str, np.ndarray]]


def _training_data(
    config: VisualDecoderStageConfig,
    run: run_folder.Run,
    documents: TrainingDocuments,
    emu: saved_emu.LoadedEmu,
    stored: store_rollouts.StoredRollouts,
) -> tuple[_Take, np.ndarray, int]:
    """Batches by record numbers, all conditions or a sample of them, and the number of records.

    Record r is pair r // V with the r % V-th of V conditions, so that an epoch has each of them once.
    """
    numbers = np.array([pair[1] for pair in documents.pairs])
    if config.condition == "rollouts":
        every = np.arange(len(numbers))
        conditions = [arrays.take(every) for arrays in stored.by_documents.values()]
    else:
        pictures = prepare_data.load_pictures(run, documents.album)
        codes = frozen.in_batches(lambda part: emu.codes(pictures.take(part)), numbers, 1024)
        # As often as the rollouts, so that an epoch is as long.
        conditions = [codes.astype(np.float16)] * len(stored.by_documents)
    album = documents.album

    def take(records: np.ndarray) -> dict[str, np.ndarray]:
        pairs, which = np.divmod(records, len(conditions))
        chosen = zip(which.tolist(), pairs.tolist(), strict=True)
        return {
            "images": np.stack([album.pixels(int(number)) for number in numbers[pairs]]),
            "condition": np.stack([conditions[each][pair] for each, pair in chosen]),
        }

    return take, np.concatenate(conditions), len(conditions) * len(numbers)


def _make_watch(
    config: VisualDecoderStageConfig, emu: saved_emu.LoadedEmu, model_config: VisualDecoderConfig
) -> loop.Watch:
    """Draws captions of test documents of seen classes, without documents, and compares with the originals.

    `seen_mse` is of pixels in 0..1; of scenes also `seen_entity`, `seen_place` and `seen_color`.
    """
    source = config.world.scenes("test", *world_config.SEEN)
    rows = world_config.sample_rows(source, config.num_watched, config.seed)
    prompts = [(source.full_caption(int(row)),) for row in rows]
    nothing = np.zeros((0, emu.config.num_slots, emu.config.decoder.embed_dim))
    codes, pixels = emu.roll_out(prompts, nothing), world_config.images(source, rows)
    graphdef, _ = param_trees.describe(partial(saved_visual.make_model, model_config, 0), None)

    def watch(step: int, params: Params) -> dict[str, float]:
        del step
        model = frozen.LoadedModel(graphdef, jax.device_get(params))
        with jax.set_mesh(Mesh(np.empty((), object), ())):  # On one device, whatever trains.
            drawn = LoadedVisualDecoder(model_config, model).draw(codes, config.seed)
        errors = np.square((drawn.astype(np.float64) - pixels) / 255)
        found = {"seen_mse": float(errors.mean())}
        if not isinstance(source, Scenes):
            return found
        levels = [source.levels[int(row)] for row in rows]
        read = scene_facts.read(drawn, levels)
        asked = [source.facts(int(row)) for row in rows]
        right = scene_accuracy.outcomes(read, asked, levels[0])
        return found | {f"seen_{fact}": float(hits.mean()) for fact, hits in right.items()}

    return watch


@dataclasses.dataclass(frozen=True)
class VisualControlSection:
    """The visual decoder that is trained on the other kind of conditions; all else is `visual_decoder`'s."""


def resolve_control(page: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the control's config, derived from those of `visual_decoder` on the page.

    Raises:
        UserError: the page has no `visual_decoder`.
    """
    del section
    if "visual_decoder" not in page:
        raise UserError("visual_control is made of visual_decoder's settings; add that stage.")
    values = dict(page["visual_decoder"])
    own = values.get("condition", CONDITIONS[0])
    return values | {"condition": next(name for name in CONDITIONS if name != own)}
