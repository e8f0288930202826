"""Stage `emu`: trains Emu on interleaved texts and pictures, after retrieved documents or none."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import checks, configuration, files, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.models.emu import emu_objective, image_codes
from rag_mm.models.emu.emu_config import CFormerConfig, EmuConfig, TargetsConfig, VisionConfig
from rag_mm.models.emu.emu_model import FITTED
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.emu import prepare_data, saved_emu
from rag_mm.stages.emu.prepare_data import EmuDataStageConfig
from rag_mm.stages.emu.training_rows import InterleavedConfig, RowMaker, RowSource, cached
from rag_mm.stages.shared import frozen, train_retriever, world_config
from rag_mm.train import loop, optimizer

INPUTS = ("retriever", "emu_data")
NUM_FITTED = 4096  # Pictures that statistics and components are made from.
VOCAB_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class EmuStageConfig:
    """Model, data and training of an Emu.

    Attributes:
        seed: seed of the initial weights, the order of documents and the random choices in sequences.
        world: world of the documents.
        emu_data: the config of the stage that prepares the data.
        model: a `DecoderConfig` without vocabulary size and length, which follow from the data.
        optimizer: learning rate, schedule and moments; `groups` give the C-Former its own.
        loop: number of steps, logging and checkpoints.
        cformer: sizes of the causal transformer between tower and decoder.
        targets: what the regression head predicts.
        image_loss_weight: weight of the regression beside the cross-entropy of text.
        retrieved_weight: weight of targets in retrieved documents.
        sequences: what training sequences are made of.
        batch_size: rows per step.
        scale: devices, precision, and what is computed in parts.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    emu_data: EmuDataStageConfig
    model: Mapping[str, Any] = dataclasses.field(
        metadata=configuration.part_of(
            DecoderConfig, ("vocab_size", "max_seq_len", "dtype", "remat", "context_dim")
        )
    )
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    cformer: CFormerConfig = dataclasses.field(default_factory=CFormerConfig)
    targets: TargetsConfig = dataclasses.field(default_factory=TargetsConfig)
    image_loss_weight: float = 1.0
    retrieved_weight: float = 1.0
    sequences: InterleavedConfig = dataclasses.field(default_factory=InterleavedConfig)
    batch_size: int = 8
    scale: scaling.DecoderScaleConfig = dataclasses.field(
        default_factory=scaling.DecoderScaleConfig
    )

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.at_least(self, 0, "image_loss_weight", "retrieved_weight")
        sizes = dict(vocab_size=VOCAB_MULTIPLE, max_seq_len=1)
        configuration.make(DecoderConfig, {**sizes, **self.model}, "model")

    def emu_config(self, vision: VisionConfig, text_size: int) -> EmuConfig:
        """The model's config, for an image tower and a number of text ids.

        Raises:
            UserError: the sizes do not fit each other.
        """
        ids, scale = prepare_data.slot_tokens(text_size), self.scale
        num_ids = text_size + len(vars(ids))
        decoder = DecoderConfig(
            vocab_size=num_ids + -num_ids % VOCAB_MULTIPLE,
            max_seq_len=self.sequences.max_seq_len,
            **dict(self.model) | {"dtype": scale.dtype, "remat": scale.remat},
        )
        try:
            return EmuConfig(
                decoder,
                ids,
                vision,
                has_tower=self.emu_data.pictures == prepare_data.PIXELS,
                cformer=self.cformer,
                targets=self.targets,
                image_loss_weight=self.image_loss_weight,
                retrieved_weight=self.retrieved_weight,
                loss_chunks=scale.loss_chunks,
            )
        except ValueError as error:
            raise UserError(f"emu: {error}.") from error


def inputs(config: EmuStageConfig) -> tuple[str, ...]:
    """The further stages that it reads with this config."""
    return ("neighbors",) if config.sequences.max_docs else ()


def make_mesh(config: EmuStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh, config.scale.num_parts)


def run(config: EmuStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains the model and writes it (`saved_emu`).

    Returns:
        `train`, the last logged metrics, and `num_params`; {} in followers.
    """
    encoder = train_retriever.load_encoder(run.workdir)
    vocabulary = prepare_data.load_vocabulary(run)
    vision = VisionConfig.of_clip(encoder.config)
    model_config = config.emu_config(vision, vocabulary.text_size)
    maker = RowMaker(
        cached(vocabulary.encode_text),
        model_config.ids,
        model_config.num_slots,
        config.sequences.max_text_len,
    )
    source = make_rows(config, run, maker)
    params, log = _train(config, stage_dir, model_config, source, encoder)
    saved_emu.save(
        stage_dir,
        model_config,
        maker.max_text_len,
        vocabulary,
        params,
        multiprocess.is_leader(),
    )
    if not multiprocess.is_leader():
        return {}
    train = {key: value for key, value in log[-1].items() if key != "step"}
    return {"train": train, "num_params": sum(leaf.size for leaf in jax.tree.leaves(params))}


def make_rows(config: EmuStageConfig, run: run_folder.Run, maker: RowMaker) -> RowSource:
    """The training rows of a run.

    Raises:
        UserError: the mixture asks for what there is not, or a stage is unfinished or edited.
    """
    documents, neighbors = config.emu_data.collect(run), None
    if config.sequences.max_docs:
        neighbors = files.read_array(run.finished_stage("neighbors") / "train.npy")
        if neighbors.shape[2] < config.sequences.max_docs:
            raise UserError(
                f"emu.sequences asks for {config.sequences.max_docs} documents, but neighbors.num_neighbors "
                f"is {neighbors.shape[2]}; make them agree."
            )
    is_tokens = config.emu_data.pictures == prepare_data.TOKENS
    return RowSource(
        config.sequences,
        documents,
        neighbors,
        maker,
        prepare_data.load_pictures(run),
        "image_tokens" if is_tokens else "images",
    )


def _train(
    config: EmuStageConfig,
    stage_dir: epath.Path,
    model_config: EmuConfig,
    source: RowSource,
    encoder: frozen.FrozenRetriever,
) -> tuple[Params, list[dict[str, float]]]:
    mesh = make_mesh(config)
    make = partial(saved_emu.make_model, model_config, config.seed)
    fit = _Fitting(model_config, source, config.seed)
    params, log = training.train(
        "emu",
        stage_dir,
        make,
        emu_objective.loss_fn,
        source.batches(
            config.batch_size,
            config.seed,
            sharding.local_rows(config.batch_size, mesh),
            config.scale.num_workers,
        ),
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
        num_parts=config.scale.num_parts,
        start=partial(_tower, encoder) if model_config.has_tower else None,
        prepare=fit.before,
        what=training.WhatTrains(is_fitted),
    )
    with jax.set_mesh(mesh):
        return fit.after(param_trees.describe(make, mesh)[0], params, mesh), log


def is_fitted(path: str) -> bool:
    """Whether a parameter is made from training images, not trained."""
    return f"{path.split('/')[0]}/*" in FITTED


def _tower(encoder: frozen.FrozenRetriever, abstract: Params) -> Params:
    """The retriever's image tower, as the parameters to start from."""
    given = param_trees.leaves_by_path(encoder.model.params["vision"])
    leaves = param_trees.leaves_by_path(abstract["tower"])
    put = {path: jax.device_put(given[path], leaf.sharding) for path, leaf in leaves.items()}
    tree = jax.tree.unflatten(jax.tree.structure(abstract["tower"]), list(put.values()))
    return {"tower": tree}


@dataclasses.dataclass(frozen=True, eq=False)
class _Fitting:
    """Makes the parameters that are not trained, from the pictures of random training sequences."""

    config: EmuConfig
    source: RowSource
    seed: int

    def before(self, params: Params) -> Params:
        """The initial parameters with statistics of the tower's tokens, and with components of them."""
        targets = self.config.targets
        if not targets.standardises_tokens and targets.kind != "pca":
            return params
        if self.config.has_tower:
            raise UserError(
                "A tower that is trained has no fixed statistics: set emu.emu_data.pictures to tokens, or "
                "targets.standardises_tokens to False and another kind than pca."
            )
        tokens = self._pictures().astype(np.float32)
        if targets.standardises_tokens:
            found = image_codes.fit_statistics(tokens)
            params = _replace(params, "vision_statistics", found)
            tokens = (tokens - found["mean"]) / found["std"]
        if targets.kind == "pca":
            found = image_codes.fit_components(tokens, targets.pca_dim, targets.has_class_slot)
            params = _replace(params, "components", found)
        return params

    def after(self, graphdef: nnx.GraphDef, params: Params, mesh: Mesh) -> Params:
        """The trained parameters with statistics of the codes, for standardised ones."""
        if self.config.targets.kind != "standardised":
            return params

        @jax.jit
        def sums(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params)
            given = batch["pictures"].astype(jnp.float32)
            tokens = model.see(given / 255) if self.config.has_tower else given
            codes = model.encode(tokens).astype(jnp.float32)
            add = lambda codes: (codes.sum(0), jnp.square(codes).sum(0))
            return sharding.automatic()(add)(codes)

        pictures, found = self._pictures(), []
        size = 256 // jax.device_count() * jax.device_count()
        count, rows = len(pictures) // size * size, sharding.local_rows(size, mesh)
        for start in range(0, count, size):
            own = pictures[start + rows.start : start + rows.stop]
            part = sums(params, sharding.put_batch({"pictures": own}, mesh))
            found.append([np.asarray(each, np.float64) for each in part])
        total, squares = (sum(parts) for parts in zip(*found, strict=True))
        mean = total / count
        variance = np.maximum(squares / count - mean**2, 0) + image_codes.VARIANCE_FLOOR
        return _replace(params, "code_statistics", {"mean": mean, "std": np.sqrt(variance)})

    def _pictures(self) -> np.ndarray:
        """The arrays of `NUM_FITTED` pictures, as often as they occur in sequences."""
        rng, numbers = np.random.default_rng((self.seed, 1)), np.zeros(0, np.int32)
        num_drawn = 0
        while len(numbers) < NUM_FITTED:
            if num_drawn == NUM_FITTED and not len(numbers):
                raise UserError(
                    "The training sequences show no picture; give sequences.mixture others than texts."
                )
            num_drawn += 1
            made = self.source.make(np.int64(rng.integers(1 << 30)), rng)
            numbers = np.concatenate([numbers, made["pictures"]])
        return self.source.pictures.take(numbers[:NUM_FITTED])


def _replace(params: Params, part: str, values: Mapping[str, np.ndarray]) -> Params:
    put = lambda name, leaf: jax.device_put(values[name].astype(leaf.dtype), leaf.sharding)
    return {**params, part: {name: put(name, leaf) for name, leaf in params[part].items()}}
