"""Stage `toy_pairs`: samples pairs of embeddings from a toy world of concepts, without any towers."""

import dataclasses

import numpy as np
from etils import epath

from rag_mm.core import checks, files, run_folder
from rag_mm.stages.reco import embed_pairs
from rag_mm.worlds import concepts

INPUTS = ()


@dataclasses.dataclass(frozen=True)
class ToyPairsStageConfig:
    """Numbers of pairs.

    Attributes:
        seed: seed of the world and the pairs.
        world: the toy world.
        num_train: number of pairs to train on.
        rare_weight: frequency of a `rare_seen` class among these, relative to a common class.
        rows_per_class: memory rows of each class.
        num_test: images of each class to classify.
        num_prompts: prompts of each class; a class is the mean of its prompts.
    """

    seed: int
    world: concepts.ConceptWorld
    num_train: int = 20_000
    rare_weight: float = 0.3
    rows_per_class: int = 20
    num_test: int = 10
    num_prompts: int = 4

    def __post_init__(self):
        checks.at_least(self, 1, "num_train", "rows_per_class", "num_test", "num_prompts")
        checks.above(self, 0, "rare_weight")


def run(config: ToyPairsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Samples and writes the pairs.

    Returns:
        The numbers of training pairs (`train`) and memory rows (`memory`).
    """
    pairs = sample_pairs(config)
    embed_pairs.save(stage_dir, pairs)
    return {"train": len(pairs.train), "memory": len(pairs.memory)}


def sample_pairs(config: ToyPairsStageConfig) -> embed_pairs.EmbeddedPairs:
    """Samples the pairs; the same config gives the same pairs."""
    world = concepts.Concepts(config.world, config.seed)
    rng = np.random.default_rng((config.seed, 1))
    seen, held_out = world.classes("common", "rare_seen"), world.classes("held_out")
    weights = np.where(world.splits[seen] == 0, 1.0, config.rare_weight)
    train_classes = rng.choice(seen, config.num_train, p=weights / weights.sum())
    memory_classes = np.repeat(np.concatenate([seen, held_out]), config.rows_per_class)
    test_classes = np.repeat(np.arange(config.world.num_classes), config.num_test)
    prompt_classes = np.repeat(np.arange(config.world.num_classes), config.num_prompts)
    prompts = world.texts(prompt_classes, rng).reshape(-1, config.num_prompts, config.world.dim)
    return embed_pairs.EmbeddedPairs(
        train=_pairs(world, train_classes, train_classes, rng),
        memory=_pairs(world, memory_classes, world.captioned_as(memory_classes, rng), rng),
        num_seen=len(seen) * config.rows_per_class,
        towers=files.digest(files.canonical_json(dataclasses.asdict(config)).encode()),
        test=_pairs(world, test_classes, test_classes, rng),
        prompts=prompts,
        splits=world.splits.astype(np.int32),
        questions=embed_pairs.no_pairs(config.world.dim),
        captioned=embed_pairs.no_pairs(config.world.dim),
        caption_keys=np.zeros(0, np.int64),
    )


def _pairs(
    world: concepts.Concepts,
    image_classes: np.ndarray,
    text_classes: np.ndarray,
    rng: np.random.Generator,
) -> embed_pairs.Pairs:
    return embed_pairs.Pairs(
        world.images(image_classes, rng),
        world.texts(text_classes, rng),
        image_classes.astype(np.int32),
    )
