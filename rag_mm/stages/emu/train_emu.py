"""Stage `emu`: trains Emu on interleaved texts and pictures, after retrieved documents or none."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import checks, configuration, files, run_folder, sharding
from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.models import clip
from rag_mm.models.emu import emu_objective
from rag_mm.models.emu.emu_config import CFormerConfig, EmuConfig, TargetsConfig, VisionConfig
from rag_mm.models.emu.emu_model import FITTED
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.emu import emu_text, prepare_data, saved_emu
from rag_mm.stages.emu.fit_codes import Fitting
from rag_mm.stages.emu.prepare_data import EmuDataStageConfig
from rag_mm.stages.emu.row_maker import RowMaker, cached
from rag_mm.stages.emu.training_rows import InterleavedConfig, RowSource
from rag_mm.stages.shared import frozen, starting_point, train_retriever, world_config
from rag_mm.train import loop, optimizer

INPUTS = ("retriever", "emu_data")
VOCAB_MULTIPLE = 128
NUM_ROLES = 2  # Ids kept for [USER] and [ASSISTANT], which instruction tuning uses.


@dataclasses.dataclass(frozen=True)
class EmuStageConfig:
    """Model, data and training of an Emu.

    Attributes:
        seed: seed of the initial weights, the order of documents and the random choices in sequences.
        world: world of the documents.
        emu_data: the config of the stage that prepares the data.
        model: a `DecoderConfig` without vocabulary size and length, which follow from the data; None: that
            of `emu_data.language_model`, from whose parameters training starts.
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
    model: Mapping[str, Any] | None = dataclasses.field(
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
        if self.model is not None:
            sizes = dict(vocab_size=VOCAB_MULTIPLE, max_seq_len=1)
            configuration.make(DecoderConfig, {**sizes, **self.model}, "model")
        elif self.emu_data.language_model is None:
            raise ValueError("model is None; give its sizes, or emu_data.language_model")

    def emu_config(self, vision: VisionConfig, text: emu_text.EmuText) -> EmuConfig:
        """The model's config, for an image tower and a vocabulary.

        Raises:
            UserError: the sizes do not fit each other, or the language model's rows are shorter.
        """
        ids, scale = emu_text.slot_tokens(text), self.scale
        decoder = self._decoder(ids)
        try:
            made = EmuConfig(
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
            length = self.sequences.rows(self.batch_size).length(made.num_slots)
            if self.model is None and length > decoder.max_seq_len:
                raise ValueError(
                    f"rows of {length} tokens are longer than the language model's {decoder.max_seq_len}"
                )
            return dataclasses.replace(
                made, decoder=dataclasses.replace(decoder, max_seq_len=length)
            )
        except ValueError as error:
            raise UserError(f"emu: {error}.") from error

    def _decoder(self, ids: SlotTokens) -> DecoderConfig:
        num_ids = 1 + max(vars(ids).values()) + NUM_ROLES
        how: dict[str, Any] = {"dtype": self.scale.dtype, "remat": self.scale.remat}
        if self.model is None:
            sizes = emu_text.language_model(str(self.emu_data.language_model))[1]
            return dataclasses.replace(sizes, vocab_size=num_ids, **how)
        return DecoderConfig(
            vocab_size=num_ids + -num_ids % VOCAB_MULTIPLE,
            max_seq_len=self.sequences.max_seq_len,
            **dict(self.model) | how,
        )


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
    if not isinstance(encoder.config, clip.CLIPConfig):
        raise UserError("emu reads images by a CLIP's tower; give the run one as retriever.folder.")
    vocabulary = prepare_data.load_vocabulary(run)
    vision = VisionConfig.of_clip(encoder.config)
    model_config = config.emu_config(vision, vocabulary)
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
        prepare_data.load_pictures(run, documents.album),
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
    fit = Fitting(model_config, source, config.seed)
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
        start=_start(config, model_config, encoder),
        prepare=fit.before,
        what=training.WhatTrains(is_fitted),
    )
    with jax.set_mesh(mesh):
        return fit.after(param_trees.describe(make, mesh)[0], params, mesh), log


def is_fitted(path: str) -> bool:
    """Whether a parameter is made from training images, not trained."""
    return f"{path.split('/')[0]}/*" in FITTED


def _start(
    config: EmuStageConfig, model_config: EmuConfig, encoder: frozen.FrozenRetriever
) -> Callable[[Params], Params] | None:
    """What makes the parameters to start from, for `training.train`; None where all are new."""
    parts: list[Callable[[Params], Params]] = []
    if model_config.has_tower:
        parts.append(partial(_tower, encoder))
    if config.model is None:
        folder = emu_text.language_model(str(config.emu_data.language_model))[0]
        folder = run_folder.Run(folder.parent).finished_stage(folder.name)
        # The first new row is that of the first new token.
        load = partial(starting_point.load_longer, folder, num_old=model_config.ids.pad)
        parts.append(lambda abstract: {"decoder": load(abstract=abstract["decoder"])})
    if not parts:
        return None
    return lambda abstract: {name: x for part in parts for name, x in part(abstract).items()}


def _tower(encoder: frozen.FrozenRetriever, abstract: Params) -> Params:
    """The retriever's image tower, as the parameters to start from."""
    given = param_trees.leaves_by_path(encoder.model.params["vision"])
    leaves = param_trees.leaves_by_path(abstract["tower"])
    put = {path: jax.device_put(given[path], leaf.sharding) for path, leaf in leaves.items()}
    tree = jax.tree.unflatten(jax.tree.structure(abstract["tower"]), list(put.values()))
    return {"tower": tree}
