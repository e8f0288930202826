"""Stage `toy_pairs`: the pairs of a world of concepts, whose frozen towers are the world itself."""

import dataclasses

import numpy as np
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.stages.reco import embed_pairs
from rag_mm.worlds import concepts

INPUTS = ()


@dataclasses.dataclass(frozen=True)
class ToyPairsStageConfig:
    """How many pairs there are.

    Attributes:
        seed: of everything.
        world: what the classes are like.
        num_train: pairs to train on.
        rare_weight: how often a rare class occurs among them, a common one being 1.
        rows_per_class: pairs of each class in the memory.
        num_test: pictures of each class to classify.
        num_prompts: texts whose mean names a class.
    """

    seed: int
    world: concepts.ConceptWorld
    num_train: int = 20_000
    rare_weight: float = 0.3
    rows_per_class: int = 20
    num_test: int = 10
    num_prompts: int = 4

    def __post_init__(self):
        for name in ("num_train", "rows_per_class", "num_test", "num_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, give at least 1")
        if self.rare_weight <= 0:
            raise ValueError(f"rare_weight is {self.rare_weight}, give more than 0")


def run(config: ToyPairsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Draws the pairs."""
    found = sample_pairs(config)
    embed_pairs.save(stage_dir, found)
    return {"train": len(found.train), "memory": len(found.memory)}


def sample_pairs(config: ToyPairsStageConfig) -> embed_pairs.EmbeddedPairs:
    """The pairs of a seed, the same for the same config."""
    world = concepts.Concepts(config.world, config.seed)
    rng = np.random.default_rng((config.seed, 1))
    seen, held_out = world.classes("common", "rare_seen"), world.classes("held_out")
    weights = np.where(world.splits[seen] == 0, 1.0, config.rare_weight)
    shown = rng.choice(seen, config.num_train, p=weights / weights.sum())
    stored = np.repeat(np.concatenate([seen, held_out]), config.rows_per_class)
    tested = np.repeat(np.arange(config.world.num_classes), config.num_test)
    prompted = np.repeat(np.arange(config.world.num_classes), config.num_prompts)
    named = world.texts(prompted, rng).reshape(-1, config.num_prompts, config.world.dim)
    return embed_pairs.EmbeddedPairs(
        train=_pairs(world, shown, shown, rng),
        memory=_pairs(world, stored, world.captioned_as(stored, rng), rng),
        num_seen=len(seen) * config.rows_per_class,
        towers=files.digest(files.canonical_json(dataclasses.asdict(config)).encode()),
        test=_pairs(world, tested, tested, rng),
        prompts=named,
        splits=world.splits.astype(np.int32),
        questions=embed_pairs.no_pairs(config.world.dim),
        captioned=embed_pairs.no_pairs(config.world.dim),
        caption_keys=np.zeros(0, np.int64),
    )


def _pairs(
    world: concepts.Concepts, shown: np.ndarray, told: np.ndarray, rng: np.random.Generator
) -> embed_pairs.Pairs:
    return embed_pairs.Pairs(
        world.images(shown, rng), world.texts(told, rng), shown.astype(np.int32)
    )
