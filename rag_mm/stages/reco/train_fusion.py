"""Stage `fusion`: RECO's two fusion modules, trained on pairs of frozen embeddings, and measured by split.

Neighbors of the training pairs are found before the first step, in the rows of seen classes alone. The
figures are those of classes that may never have been trained on: on classes that were, any trained head
memorises the mapping, whatever it retrieves (specification, section 12).
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
from rag_mm.eval import statistics, zeroshot
from rag_mm.models import reco
from rag_mm.nn.param_trees import Params
from rag_mm.stages import multiprocess, training
from rag_mm.stages.ra_cm3 import evaluate
from rag_mm.stages.reco import embed_pairs
from rag_mm.stages.reco.refinement import (
    Bank,
    Fuse,
    Refiner,
    RetrievedRows,
    SearchSettings,
    fuse,
    learned,
    mean,
)
from rag_mm.stages.shared import frozen
from rag_mm.train import checkpoint, loop, optimizer, train_step

# Rows of a batch are drawn so many at a time: one by one, drawing them would take longer than the step.
GROUP = 32
RECORD = "fusion.json"
PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class FusionStageConfig:
    """How the fusion is trained and looked at.

    Attributes:
        world: of the pairs; for the record.
        model: fields of `reco.RecoConfig`; `dim` comes with the embeddings.
        search: what is retrieved, in training and, unless changed, at inference.
        train_in_memory: the training pairs stand among the rows that they may retrieve.
        mask_self: then none retrieves itself.
        curve_neighbors, curve_rows: further k, and rows of each class in the memory, to measure with.
        question_weight: of a question's embedding, added to its picture's.
    """

    seed: int
    world: Any
    model: Mapping[str, Any]
    optimizer: optimizer.OptimizerConfig
    loop: loop.LoopConfig
    search: SearchSettings = dataclasses.field(default_factory=SearchSettings)
    batch_size: int = 256
    train_in_memory: bool = False
    mask_self: bool = True
    curve_neighbors: tuple[int, ...] = (1, 2, 5, 20)
    curve_rows: tuple[int, ...] = (1, 5, 10)
    question_weight: float = 1.0

    def __post_init__(self):
        training.check_config(self.optimizer, self.loop, self.batch_size)
        if self.batch_size % GROUP:
            raise ValueError(f"batch_size is {self.batch_size}, give a multiple of {GROUP}")
        if min((1, *self.curve_neighbors, *self.curve_rows)) < 1:
            raise ValueError("curve_neighbors and curve_rows are at least 1 each")
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
        values = FusionEvaluation(config, found, mounted, make_model).all()
        files.write_json(stage_dir / evaluate.PER_DOCUMENT, _lists(values))
        metrics |= {"accuracy": _summary(values)}
    if run.manifest("retriever") is not None:
        folder = run.finished_stage("retriever") / "frozen"
        metrics["towers_unchanged"] = frozen.fingerprint(folder) == found.towers
    return metrics


@dataclasses.dataclass(frozen=True)
class TrainedFusion:
    """A trained fusion: its model, how it searched, and the fingerprint of its towers."""

    mounted: frozen.Mounted
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
    found: embed_pairs.Embedded,
    stage_dir: epath.Path,
) -> tuple[Params, list[dict[str, float]]]:
    train, neighbors = found.train, find_for_training(config, found)

    def draw_group(_: np.int64, rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows = rng.integers(len(train), size=GROUP)
        batch = {"image": train.image[rows], "text": train.text[rows]}
        batch["class_ids"] = train.class_ids[rows]
        for name, own in neighbors.items():
            batch[f"{name}_retrieved"], batch[f"{name}_is_there"] = own.take(rows)
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
    config: FusionStageConfig, found: embed_pairs.Embedded
) -> dict[str, RetrievedRows]:
    """What each training pair retrieves, by modality; a pair may stand among the rows itself."""
    rows, own_rows = found.seen_memory, None
    if config.train_in_memory:
        own_rows = len(rows) + np.arange(len(found.train)) if config.mask_self else None
        rows = rows + found.train
    bank = Bank.of_pairs(rows)
    return {
        name: config.search.find(bank, name, getattr(found.train, name), own_rows)
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


Values = dict[str, dict[str, np.ndarray]]


class FusionEvaluation:
    """Accuracy under every condition of section 12, picture by picture."""

    def __init__(
        self,
        config: FusionStageConfig,
        found: embed_pairs.Embedded,
        mounted: frozen.Mounted,
        make_model: Callable[[], reco.RECO],
    ):
        """Takes what was trained, and how a fresh one is made."""
        self._config, self._found, self._make_model = config, found, make_model
        self._fusions = learned(mounted)
        self._names = zeroshot.ensemble(found.prompts)
        self._bank = Bank.of_pairs(found.memory)

    def all(self) -> Values:
        """{split: {condition: bool [Q]}}, and retrieval and questions where there are any."""
        values: Values = {name: {} for name in self._found.split_names}
        split_of_test = self._found.splits[self._found.test.class_ids]
        for condition, hits in self._conditions().items():
            for number, name in enumerate(self._found.split_names):
                values[name][condition] = hits[split_of_test == number]
        return values | self._retrieval() | self._answers()

    def _conditions(self) -> dict[str, np.ndarray]:
        config, found = self._config, self._found
        image, text = found.test.image, self._names
        whole = self._refine(self._fusions, self._bank, config.search)
        hits = {
            "frozen": self._hits(image, text),
            "both": self._hits(*whole),
            "image": self._hits(whole[0], text),
            "text": self._hits(image, whole[1]),
        }
        fresh = nnx.split(self._make_model(), nnx.Param)
        untrained = frozen.Mounted(fresh[0], nnx.to_pure_dict(fresh[1]))
        others: dict[str, tuple[Mapping[str, Fuse], Bank, SearchSettings]] = {
            "step 0": (learned(untrained), self._bank, config.search),
            "mean": (mean(), self._bank, config.search),
        }
        for name, bank in self._banks().items():
            others[name] = (self._fusions, bank, config.search)
        for k in config.curve_neighbors:
            search = dataclasses.replace(config.search, num_neighbors=k)
            others[f"k{k}"] = (self._fusions, self._bank, search)
        for control in ("query", "random"):
            search = dataclasses.replace(config.search, retrieval_override=control)
            others[f"{control} at test"] = (self._fusions, self._bank, search)
        return hits | {name: self._hits(*self._refine(*how)) for name, how in others.items()}

    def _banks(self) -> dict[str, Bank]:
        """Memories to be exchanged for the whole one."""
        found, rng = self._found, np.random.default_rng((self._config.seed, 8))
        memory, seen = found.memory, found.seen_memory
        shuffled = memory.text[rng.permutation(len(memory))]
        banks = {
            "rows removed": Bank.of_pairs(seen),
            "rows back": Bank.of_pairs(seen + memory.take(np.arange(found.num_seen, len(memory)))),
            "texts shuffled": Bank({"image": memory.image, "text": shuffled}),
        }
        place = _place_in_class(memory.class_ids)
        for count in self._config.curve_rows:
            banks[f"rows{count}"] = Bank.of_pairs(memory.take(place < count))
        return banks

    def _refine(
        self, fusions: Mapping[str, Fuse], bank: Bank, search: SearchSettings
    ) -> tuple[np.ndarray, np.ndarray]:
        refiner = Refiner(fusions, bank, search)
        return refiner.refine("image", self._found.test.image), refiner.refine("text", self._names)

    def _hits(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return zeroshot.hits_at_1(images, classes, self._found.test.class_ids)

    def _retrieval(self) -> Values:
        """Recall of pictures by captions and of captions by pictures."""
        captioned, keys = self._found.captioned, self._found.caption_keys
        if not len(captioned):
            return {}
        wanted = keys[:, None] == keys[None, :]
        refiner = Refiner(self._fusions, self._bank, self._config.search)
        sides = {"frozen": (captioned.image, captioned.text)}
        sides["both"] = (
            refiner.refine("image", captioned.image),
            refiner.refine("text", captioned.text),
        )
        values: Values = {"text_to_image": {}, "image_to_text": {}}
        for name, (image, text) in sides.items():
            for direction, similarities in (
                ("text_to_image", text @ image.T),
                ("image_to_text", image @ text.T),
            ):
                for k, hits in zeroshot.recall_at_k(similarities, wanted).items():
                    values[direction][f"{name} at {k}"] = hits
        return values

    def _answers(self) -> Values:
        """Entities asked for by a question about a part of a picture (OVEN)."""
        questions = self._found.questions
        if not len(questions):
            return {}
        joined = questions.image + self._config.question_weight * questions.text
        joined = (joined / np.linalg.norm(joined, axis=1, keepdims=True)).astype(np.float32)
        search = self._config.search
        refiner = Refiner(self._fusions, self._bank, search)
        refined = fuse(
            self._fusions["image"],
            joined,
            # The picture alone is looked up: a question is like no picture in the memory.
            search.find(self._bank, "image", questions.image),
        )
        names = refiner.refine("text", self._names)
        hits = {
            "frozen": zeroshot.hits_at_1(joined, self._names, questions.class_ids),
            "both": zeroshot.hits_at_1(refined, names, questions.class_ids),
        }
        of_split = self._found.splits[questions.class_ids]
        return {
            f"entities_{name}": {key: right[of_split == i] for key, right in hits.items()}
            for i, name in enumerate(self._found.split_names)
        }


def _place_in_class(class_ids: np.ndarray) -> np.ndarray:
    """How many rows of its class stand before each: int64 [N]."""
    order = np.argsort(class_ids, kind="stable")
    ranked = class_ids[order]
    starts = np.searchsorted(ranked, ranked)
    place = np.empty(len(class_ids), np.int64)
    place[order] = np.arange(len(class_ids)) - starts
    return place


def _lists(values: Values) -> dict[str, dict[str, list[float]]]:
    return {
        name: {key: hits.astype(float).tolist() for key, hits in part.items()}
        for name, part in values.items()
    }


def _summary(values: Values) -> dict[str, Any]:
    """Accuracies, and OVEN's harmonic mean of seen and unseen where entities were asked for."""
    figures: dict[str, Any] = {
        name: {key: statistics.accuracy(hits) for key, hits in part.items()}
        for name, part in values.items()
        if all(len(hits) for hits in part.values())
    }
    if "entities_held_out" in figures and "entities_common" in figures:
        figures["entities_harmonic_mean"] = {
            key: zeroshot.harmonic_mean(
                figures["entities_common"][key]["accuracy"],
                figures["entities_held_out"][key]["accuracy"],
            )
            for key in ("frozen", "both")
        }
    return figures
