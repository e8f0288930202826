"""Stage `pairs`: everything that RECO's fusion trains on and is measured by, as embeddings of frozen towers.

Towers and memory do not change while the fusion learns, so each picture and each text is embedded once.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, run_folder
from rag_mm.eval import zeroshot
from rag_mm.memory import policy
from rag_mm.stages.shared import build_memory, frozen, train_retriever, world_config
from rag_mm.worlds.emoji import art, class_splits, emoji_scenes

INPUTS = ("retriever", "memory")
FACTS = "pairs.json"
# Class ids of the world, int [N], to places among its classes, int32 [N].
Numbers = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Unit rows of images and of their texts, float32 [P, D], and what each shows, int32 [P].

    A negative class is none: such a pair is like no other.
    """

    image: np.ndarray
    text: np.ndarray
    class_ids: np.ndarray

    def take(self, rows: np.ndarray) -> "Pairs":
        """Some of the pairs, by number or mask."""
        return Pairs(self.image[rows], self.text[rows], self.class_ids[rows])

    def __len__(self) -> int:
        return len(self.image)

    def __add__(self, other: "Pairs") -> "Pairs":
        """These, then the others."""
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Pairs(*(np.concatenate(parts) for parts in both))


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedPairs:
    """What a `pairs` stage leaves.

    Attributes:
        train: pairs to train on.
        memory: rows that may be retrieved, those of seen classes first.
        num_seen: how many these are; training retrieves nothing else.
        towers: fingerprint of the frozen towers.
        test: pictures to classify, with a caption each; empty without a benchmark.
        prompts: float32 [C, P, D], texts that name each class.
        splits: int32 [C], an index into `split_names`.
        questions: pictures, questions about a part of each, and the answers' classes.
        captioned: pictures with captions that tell all, to find each other.
        caption_keys: int64, equal for `captioned` of one caption.
    """

    train: Pairs
    memory: Pairs
    num_seen: int
    towers: str
    test: Pairs
    prompts: np.ndarray
    splits: np.ndarray
    questions: Pairs
    captioned: Pairs
    caption_keys: np.ndarray
    split_names: tuple[str, ...] = class_splits.SPLITS

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.memory.image.shape[1]

    @property
    def seen_memory(self) -> Pairs:
        """The rows that training may retrieve."""
        return self.memory.take(np.arange(self.num_seen))


def no_pairs(dim: int) -> Pairs:
    """None of that width."""
    nothing = np.zeros((0, dim), np.float32)
    return Pairs(nothing, nothing, np.zeros(0, np.int32))


_PARTS = ("train", "memory", "test", "questions", "captioned")
_ARRAYS = ("prompts", "splits", "caption_keys")


def save(folder: epath.Path, found: EmbeddedPairs) -> None:
    """Writes what `load` reads."""
    for part in _PARTS:
        for field, array in vars(getattr(found, part)).items():
            files.write_array(folder / f"{part}_{field}.npy", array)
    for name in _ARRAYS:
        files.write_array(folder / f"{name}.npy", getattr(found, name))
    facts = {name: getattr(found, name) for name in ("num_seen", "towers", "split_names")}
    files.write_json(folder / FACTS, facts)


def load(folder: epath.Path) -> EmbeddedPairs:
    """Reads what `save` wrote."""
    fields = [field.name for field in dataclasses.fields(Pairs)]
    found: dict[str, Any] = {
        part: Pairs(*(files.read_array(folder / f"{part}_{field}.npy") for field in fields))
        for part in _PARTS
    }
    found |= {name: files.read_array(folder / f"{name}.npy") for name in _ARRAYS}
    found |= files.read_json(folder / FACTS)
    return EmbeddedPairs(**found | {"split_names": tuple(found["split_names"])})


@dataclasses.dataclass(frozen=True)
class PairsStageConfig:
    """How scenes become pairs.

    Attributes:
        seed: of the captions.
        world: where the scenes come from.
        train_splits: whose scenes the fusion learns from.
        captions_per_image: captions of each training scene, with facts dropped at random.
        rare_repeats: how often scenes of rare classes count, which have a quarter of the scenes.
        templates: of which the mean names a class.
        max_test: pictures to classify, of each split; questions and captioned pictures as many.
    """

    seed: int
    world: world_config.EmojiWorld
    train_splits: tuple[str, ...] = ("common", "rare_seen")
    captions_per_image: int = 2
    rare_repeats: int = 1
    templates: tuple[str, ...] = zeroshot.NAME_ONLY
    max_test: int = 1000

    def __post_init__(self):
        known = ("common", "rare_seen")
        if not self.train_splits or not set(self.train_splits) <= set(known):
            raise ValueError(f"train_splits are some of {', '.join(known)}")
        if min(self.captions_per_image, self.rare_repeats, self.max_test) < 1:
            raise ValueError("captions_per_image, rare_repeats and max_test are at least 1")
        zeroshot.prompts(["name"], self.templates)


def run(config: PairsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Embeds scenes by the run's retriever."""
    encoder = train_retriever.load_encoder(run.workdir)
    memory = build_memory.open_memory(run)
    sources = [
        config.world.scenes("memory", *part) for part in (world_config.SEEN, world_config.HELD_OUT)
    ]
    shown = np.concatenate([source.class_ids for source in sources])
    class_ids = config.world.classes(*class_splits.SPLITS)
    number_of = {int(class_id): number for number, class_id in enumerate(class_ids)}
    numbers = lambda ids: np.array([number_of[int(i)] for i in ids], np.int32)
    names = art.load_art().names
    texts = zeroshot.prompts([names[i][0] for i in class_ids], config.templates)
    tests = [config.world.scenes("test", split) for split in class_splits.SPLITS]
    found = EmbeddedPairs(
        train=_train(config, encoder, numbers),
        memory=Pairs(memory.embeddings("image"), memory.embeddings("text"), numbers(shown)),
        num_seen=len(sources[0]),
        towers=encoder.fingerprint,
        test=_sum(encoder.dim, (_test(config, encoder, source, numbers) for source in tests)),
        prompts=encoder.encode_text(texts).reshape(len(class_ids), -1, encoder.dim),
        splits=class_splits.split_of()[class_ids].astype(np.int32),
        questions=_sum(
            encoder.dim, (_questions(config, encoder, source, numbers) for source in tests)
        ),
        **_captioned(config, encoder, numbers),
    )
    save(stage_dir, found)
    return {
        "train": len(found.train),
        "memory": len(found.memory),
        "classes": {
            name: int((found.splits == i).sum()) for i, name in enumerate(class_splits.SPLITS)
        },
    }


def _sum(dim: int, parts: Iterable[Pairs]) -> Pairs:
    return sum(parts, no_pairs(dim))


def _train(config: PairsStageConfig, encoder: frozen.FrozenRetriever, numbers: Numbers) -> Pairs:
    parts = []
    for split in config.train_splits:
        source = config.world.scenes("train", split)
        image, rows = encoder.encode_image(world_config.images(source)), range(len(source))
        repeats = config.rare_repeats if split == "rare_seen" else 1
        for draw in range(config.captions_per_image * repeats):
            text = encoder.encode_text([source.caption(row, draw) for row in rows])
            parts.append(Pairs(image, text, numbers(source.class_ids)))
    return _sum(encoder.dim, parts)


def _test(
    config: PairsStageConfig,
    encoder: frozen.FrozenRetriever,
    source: emoji_scenes.Scenes,
    numbers: Numbers,
) -> Pairs:
    """Scenes of one entity, since a picture of two has no one class."""
    alone = [row for row in range(len(source)) if len(source.facts(row).entities) == 1]
    rows = world_config.evenly_spaced(np.array(alone, np.int64), config.max_test)
    return _embed(encoder, source, rows, [source.caption(int(r), 0) for r in rows], numbers)


def _questions(
    config: PairsStageConfig,
    encoder: frozen.FrozenRetriever,
    source: emoji_scenes.Scenes,
    numbers: Numbers,
) -> Pairs:
    """What stands at the place of a picture's first entity, where a level may show two (OVEN)."""
    asked_of = [row for row, level in enumerate(source.levels) if level.max_entities == 2]
    rows = world_config.evenly_spaced(np.array(asked_of, np.int64), config.max_test)
    if not len(rows):
        return no_pairs(encoder.dim)
    asked = [
        f"what is at the {emoji_scenes.place(source.facts(int(r)).entities[0], source.levels[r])}?"
        for r in rows
    ]
    return _embed(encoder, source, rows, asked, numbers)


def _captioned(
    config: PairsStageConfig, encoder: frozen.FrozenRetriever, numbers: Numbers
) -> dict[str, Any]:
    level = config.world.levels[-1]
    ids = config.world.classes(*class_splits.SPLITS)
    source = emoji_scenes.Scenes(level, ids, "test", class_share=config.world.class_share)
    rows = world_config.evenly_spaced(np.arange(len(source)), config.max_test)
    texts = [source.full_caption(int(row)) for row in rows]
    keys = np.array([policy.fact_key(text) for text in texts], np.int64)
    return {
        "captioned": _embed(encoder, source, rows, texts, numbers),
        "caption_keys": keys,
    }


def _embed(
    encoder: frozen.FrozenRetriever,
    source: emoji_scenes.Scenes,
    rows: np.ndarray,
    texts: list[str],
    numbers: Numbers,
) -> Pairs:
    image = encoder.encode_image(world_config.images(source, rows))
    return Pairs(image, encoder.encode_text(texts), numbers(source.class_ids[rows]))
