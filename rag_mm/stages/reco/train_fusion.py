"""Stage `fusion`: trains RECO's two fusion modules on pairs of frozen embeddings, and measures them by split.

The neighbors of the training pairs are retrieved before the first step: from memory rows of seen classes
only, or, of pairs on disk (`stored_pairs`), from the memory that they name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import checks, configuration, files, manifest_values, run_folder, sharding
from rag_mm.data import pipeline
from rag_mm.models import reco
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, scaling, training
from rag_mm.stages.reco import embed_pairs, stored_pairs
from rag_mm.stages.reco.measure_fusion import (
    FusionEvaluation,
    MeasuresConfig,
    summarize,
    to_lists,
)
from rag_mm.stages.reco.refinement import Bank, RetrievedRows, SearchSettings
from rag_mm.stages.shared import frozen
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.train import checkpoint, loop, optimizer

# The stage whose pairs stay on disk; those of all others are in memory.
STORED = "document_pairs"
RECORD = "fusion.json"
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class FusionStageConfig:
    """How the fusion is trained and measured.

    Attributes:
        seed: seed of the initial weights and the order of pairs.
        world: world of the pairs; recorded only.
        pairs: stage whose pairs are used: pairs (emoji scenes), toy_pairs (a toy world) or document_pairs
            (any documents).
        model: a `RecoConfig` without `dim`, which follows from the embeddings.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        search: how neighbors are retrieved, in training and by default at inference.
        measures: what is measured after training.
        batch_size: pairs per step, at most as many as there are; no pair is in a batch twice.
        train_in_memory: add the training pairs to the memory rows that training retrieves.
        mask_self: with `train_in_memory`, prevent a pair from retrieving itself.
        scale: devices, precision, and what is computed in parts. Every pair is compared with all others of
            its batch, on however many devices.
    """

    seed: int
    world: Any
    model: Mapping[str, Any] = dataclasses.field(
        metadata=configuration.part_of(reco.RecoConfig, ("dim",))
    )
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    search: SearchSettings = dataclasses.field(default_factory=SearchSettings)
    measures: MeasuresConfig = dataclasses.field(default_factory=MeasuresConfig)
    batch_size: int = 256
    train_in_memory: bool = False
    mask_self: bool = True
    scale: scaling.FusionScaleConfig = dataclasses.field(
        default=scaling.FusionScaleConfig(), metadata=manifest_values.ADDED_LATER
    )
    pairs: str = dataclasses.field(default="pairs", metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        checks.one_of(self, "pairs", ("pairs", "toy_pairs", STORED))
        if self.pairs == STORED and self.train_in_memory:
            raise ValueError(
                f"train_in_memory is not for {STORED}; build the memory with their documents instead"
            )
        self.reco(8 * self.model.get("num_heads", 8))

    def reco(self, dim: int) -> reco.RecoConfig:
        """The model's config for embeddings of width `dim`; raises UserError if its settings are invalid."""
        return configuration.make(reco.RecoConfig, {"dim": dim} | dict(self.model), "model")


def make_mesh(config: FusionStageConfig) -> Mesh:
    """The mesh to train on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size, config.scale.mesh)


def run(config: FusionStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Trains the fusion; if the pairs have a test set, measures it and writes `per_document.json`.

    Returns:
        The last logged metrics, `num_params`, and if measured `accuracy` by split and condition; if the run
        has a retriever, `towers_unchanged`. {} in followers.
    """
    folder, is_stored = run.finished_stage(config.pairs), config.pairs == STORED
    pairs = stored_pairs.load(folder) if is_stored else embed_pairs.load(folder)
    model_config = config.reco(pairs.dim)
    make_model = partial(_make_model, model_config, config.seed)
    params, log = _train(config, make_model, pairs, stage_dir)
    params = jax.device_get(params)
    checkpoint.save_params(stage_dir / PARAMS, params)
    if not multiprocess.is_leader():
        return {}
    record = {
        "model": dataclasses.asdict(model_config),
        "search": dataclasses.asdict(config.search),
        "towers": pairs.towers,
    }
    files.write_json(stage_dir / RECORD, record)
    model = load_fusion(stage_dir).model
    last = {name: value for name, value in log[-1].items() if name != "step"}
    metrics = last | {"num_params": sum(leaf.size for leaf in jax.tree.leaves(params))}
    if isinstance(pairs, embed_pairs.EmbeddedPairs) and len(pairs.test):
        evaluation = FusionEvaluation(
            config.measures, config.search, config.seed, pairs, model, make_model
        )
        values = evaluation.all()
        files.write_json(stage_dir / PER_DOCUMENT, to_lists(values))
        metrics |= {"accuracy": summarize(values)}
    if run.manifest("retriever") is not None:
        folder = run.finished_stage("retriever") / "frozen"
        metrics["towers_unchanged"] = frozen.fingerprint(folder) == pairs.towers
    return metrics


@dataclasses.dataclass(frozen=True)
class TrainedFusion:
    """A trained fusion: the model, its search settings, and the fingerprint of its towers."""

    model: frozen.LoadedModel
    search: SearchSettings
    towers: str


def load_fusion(folder: epath.Path) -> TrainedFusion:
    """Loads a fusion from the folder of its stage.

    Raises:
        UserError: there is no fusion, or its files do not match this version.
    """
    record = files.read_object(folder / RECORD, model=dict, search=dict, towers=str)
    model_config = configuration.make(reco.RecoConfig, record["model"], str(folder / RECORD))
    search = configuration.make(SearchSettings, record["search"], str(folder / RECORD))
    model = frozen.load_params(folder / PARAMS, partial(_make_model, model_config, 0))
    return TrainedFusion(model, search, record["towers"])


def _make_model(
    config: reco.RecoConfig, seed: int, dtype: str = "float32", remat: str = "none"
) -> reco.RECO:
    return reco.RECO(config, rngs=nnx.Rngs(params=seed), dtype=dtype, remat=remat)


def _train(
    config: FusionStageConfig,
    make_model: Callable[..., reco.RECO],
    pairs: embed_pairs.EmbeddedPairs | stored_pairs.StoredPairs,
    stage_dir: epath.Path,
) -> tuple[Params, list[dict[str, float]]]:
    mesh, draw = make_mesh(config), None
    neighbors: Mapping[str, RetrievedRows | stored_pairs.StoredNeighbors]
    if isinstance(pairs, stored_pairs.StoredPairs):
        count, take_pairs = len(pairs), pairs.take
        draw = partial(pairs.draw, seed=config.seed)
        neighbors = stored_pairs.find_neighbors(config.search, pairs, stage_dir)
    else:
        count, take_pairs = len(pairs.train), pairs.train.batch
        neighbors = find_for_training(config, pairs)

    def take(rows: np.ndarray) -> dict[str, np.ndarray]:
        batch = take_pairs(rows)
        for name, retrieved in neighbors.items():
            batch[f"{name}_retrieved"], batch[f"{name}_neighbor_mask"] = retrieved.take(rows)
        return batch

    rows = sharding.local_rows(config.batch_size, mesh)
    batches = pipeline.make_array_batches(
        count, config.batch_size, config.seed, take, rows=rows, draw=draw
    )
    return training.train(
        "fusion",
        stage_dir,
        partial(make_model, dtype=config.scale.dtype, remat=config.scale.remat),
        partial(reco.loss_fn, num_chunks=config.scale.loss_chunks),
        batches,
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
    )


def find_for_training(
    config: FusionStageConfig, pairs: embed_pairs.EmbeddedPairs
) -> dict[str, RetrievedRows]:
    """Retrieves the neighbors of all training pairs, by modality (`image`, `text`)."""
    rows, query_rows = pairs.seen_memory, None
    if config.train_in_memory:
        query_rows = len(rows) + np.arange(len(pairs.train)) if config.mask_self else None
        rows = rows + pairs.train
    bank = Bank.of_pairs(rows)
    return {
        name: config.search.find(bank, name, getattr(pairs.train, name), query_rows)
        for name in reco.MODALITIES
    }
