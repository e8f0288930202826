"""Stage `fusion`: RECO's two fusion modules, trained on pairs of frozen embeddings, and measured by split.

Neighbors of the training pairs are found before the first step, among the memory rows of seen classes only.
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

from rag_mm.core import configuration, files, run_folder, sharding
from rag_mm.data import pipeline
from rag_mm.models import reco
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, training
from rag_mm.stages.reco import embed_pairs
from rag_mm.stages.reco.measure_fusion import (
    FusionEvaluation,
    MeasuresConfig,
    summarize,
    to_lists,
)
from rag_mm.stages.reco.refinement import Bank, RetrievedRows, SearchSettings
from rag_mm.stages.shared import frozen
from rag_mm.stages.stage import PER_DOCUMENT
from rag_mm.train import checkpoint, loop, optimizer, train_step

# Rows of a batch are drawn so many at a time: one by one, drawing them would take longer than the step.
GROUP = 32
RECORD = "fusion.json"
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class FusionStageConfig:
    """How the fusion is trained and measured.

    Attributes:
        seed: of initial weights and of the order of pairs.
        world: of the pairs; recorded, not read.
        model: a `RecoConfig` without `dim`, which comes with the embeddings.
        optimizer: learning rate, schedule and moments.
        loop: number of steps, logging and checkpoints.
        search: what is retrieved, in training and, unless overridden, at inference.
        measures: what is measured after training.
        batch_size: pairs a step; a multiple of 32.
        train_in_memory: the training pairs are among the memory rows they may retrieve.
        mask_self: with `train_in_memory`, no pair retrieves itself.
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

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        if self.batch_size % GROUP:
            raise ValueError(f"batch_size is {self.batch_size}, give a multiple of {GROUP}")
        self.reco(8 * self.model.get("num_heads", 8))

    def reco(self, dim: int) -> reco.RecoConfig:
        """The model over embeddings of a width; raises UserError where its settings do not fit."""
        return configuration.make(reco.RecoConfig, {"dim": dim} | dict(self.model), "model")


def make_mesh(config: FusionStageConfig) -> Mesh:
    """What it trains on; raises as `training.make_mesh` does."""
    return training.make_mesh(config.batch_size // GROUP)


def run(
    config: FusionStageConfig, run: run_folder.Run, stage_dir: epath.Path, *, source: str = "pairs"
) -> dict:
    """Trains; then, where there is something to classify, writes `per_document.json`."""
    found = embed_pairs.load(run.finished_stage(source))
    model_config = config.reco(found.dim)
    make_model = partial(_make_model, model_config, config.seed)
    params, rows = _train(config, make_model, found, stage_dir)
    params = jax.device_get(params)
    checkpoint.save_params(stage_dir / PARAMS, params)
    if not multiprocess.is_leader():
        return {}
    record = {
        "model": dataclasses.asdict(model_config),
        "search": dataclasses.asdict(config.search),
        "towers": found.towers,
    }
    files.write_json(stage_dir / RECORD, record)
    mounted = load_fusion(stage_dir).mounted
    last = {name: rows[-1][name] for name in rows[-1] if name != "step"}
    metrics = last | {"num_params": sum(leaf.size for leaf in jax.tree.leaves(params))}
    if len(found.test):
        evaluation = FusionEvaluation(
            config.measures, config.search, config.seed, found, mounted, make_model
        )
        values = evaluation.all()
        files.write_json(stage_dir / PER_DOCUMENT, to_lists(values))
        metrics |= {"accuracy": summarize(values)}
    if run.manifest("retriever") is not None:
        folder = run.finished_stage("retriever") / "frozen"
        metrics["towers_unchanged"] = frozen.fingerprint(folder) == found.towers
    return metrics


@dataclasses.dataclass(frozen=True)
class TrainedFusion:
    """A trained fusion: its model, how it searched, and the fingerprint of its towers."""

    mounted: frozen.LoadedModel
    search: SearchSettings
    towers: str


def load_fusion(folder: epath.Path) -> TrainedFusion:
    """What the stage left in its folder.

    Raises:
        UserError: nothing is there, or it is another model's.
    """
    record = files.read_json(folder / RECORD)
    model_config = configuration.make(reco.RecoConfig, record["model"], str(folder / RECORD))
    search = configuration.make(SearchSettings, record["search"], str(folder / RECORD))
    mounted = frozen.load_params(folder / PARAMS, partial(_make_model, model_config, 0))
    return TrainedFusion(mounted, search, record["towers"])


def _make_model(config: reco.RecoConfig, seed: int) -> reco.RECO:
    return reco.RECO(config, rngs=nnx.Rngs(params=seed))


def _train(
    config: FusionStageConfig,
    make_model: Callable[[], reco.RECO],
    found: embed_pairs.EmbeddedPairs,
    stage_dir: epath.Path,
) -> tuple[Params, list[dict[str, float]]]:
    train, neighbors = found.train, find_for_training(config, found)

    def draw_group(_: np.int64, rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows = rng.integers(len(train), size=GROUP)
        batch = {"image": train.image[rows], "text": train.text[rows]}
        batch["class_ids"] = train.class_ids[rows]
        for name, own in neighbors.items():
            batch[f"{name}_retrieved"], batch[f"{name}_neighbor_mask"] = own.take(rows)
        return batch

    num_groups, size = max(config.batch_size, len(train)) // GROUP, config.batch_size // GROUP
    mesh = make_mesh(config)
    batches = pipeline.make_batches(
        np.arange(num_groups),
        size,
        config.seed,
        draw_group,
        rows=sharding.local_rows(size, mesh),
    )
    return training.train(
        "fusion",
        stage_dir,
        make_model,
        _loss_of_groups,
        batches,
        optimizer_config=config.optimizer,
        loop_config=config.loop,
        seed=config.seed,
        mesh=mesh,
    )


def find_for_training(
    config: FusionStageConfig, found: embed_pairs.EmbeddedPairs
) -> dict[str, RetrievedRows]:
    """What each training pair retrieves, by modality; a pair may stand among the rows itself."""
    rows, query_rows = found.seen_memory, None
    if config.train_in_memory:
        query_rows = len(rows) + np.arange(len(found.train)) if config.mask_self else None
        rows = rows + found.train
    bank = Bank.of_pairs(rows)
    return {
        name: config.search.find(bank, name, getattr(found.train, name), query_rows)
        for name in reco.MODALITIES
    }


def _loss_of_groups(
    model: nnx.Module, batch: Mapping[str, jax.Array], rng: jax.Array
) -> tuple[jax.Array, train_step.Metrics]:
    """The loss of a batch [G, GROUP, ...]."""

    def flatten(x: jax.Array) -> jax.Array:
        shape = (x.shape[0] * x.shape[1], *x.shape[2:])
        spec = sharding.activation_spec("batch", *(None,) * (len(shape) - 1))
        return jax.lax.reshape(x, shape, out_sharding=spec)

    assert isinstance(model, reco.RECO)
    return reco.loss_fn(model, jax.tree.map(flatten, dict(batch)), rng)
