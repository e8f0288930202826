"""Stage `pairs`: embeds all images and texts that RECO's fusion is trained and measured on.

Towers and memory do not change while the fusion trains, so every image and every text is embedded once.
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
from rag_mm.worlds import concepts
from rag_mm.worlds.emoji import art, class_splits, emoji_scenes

INPUTS = ("retriever", "memory")
METADATA = "pairs.json"
# Images are classified among all classes; those of tune classes are not tested.
TESTED_SPLITS = ("common", "rare_seen", *world_config.TEST)
HELD_OUT_INDEX = concepts.SPLITS.index("held_out")
# Class ids of the world, int [N] -> indices into its list of classes, int32 [N].
ToIndices = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of an image and its text, as embeddings.

    Attributes:
        image: embeddings of the images, float32 [P, D], of length 1.
        text: embeddings of the texts, float32 [P, D], of length 1.
        class_ids: class of each pair, int32 [P]; -1 if unknown, and then unlike that of any other pair.
    """

    image: np.ndarray
    text: np.ndarray
    class_ids: np.ndarray

    def take(self, rows: np.ndarray) -> "Pairs":
        """Some of the pairs, by index or mask."""
        return Pairs(self.image[rows], self.text[rows], self.class_ids[rows])

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some of the pairs as a training batch."""
        return dict(vars(self.take(rows)))

    def __len__(self) -> int:
        return len(self.image)

    def __add__(self, other: "Pairs") -> "Pairs":
        """These pairs followed by the others."""
        both = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Pairs(*(np.concatenate(parts) for parts in both))


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedPairs:
    """The result of a stage that embeds pairs.

    Attributes:
        train: pairs to train on.
        memory: memory rows, those of seen classes first.
        num_seen: number of memory rows of seen classes; training retrieves only these.
        towers: fingerprint of the frozen towers.
        test: images to classify, with a caption each; empty if there is no benchmark.
        prompts: embeddings of P prompts for each of C classes, float32 [C, P, D].
        splits: split of each class, int32 [C], as an index into `split_names`.
        questions: images, questions about a part of each, and the classes of the answers.
        captioned: images and full captions, for retrieval in both directions.
        caption_keys: int64 [P], equal for equal captions in `captioned`.
        split_names: names of the splits.
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
    split_names: tuple[str, ...] = concepts.SPLITS

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return self.memory.image.shape[1]

    @property
    def seen_memory(self) -> Pairs:
        """The memory rows of seen classes."""
        return self.memory.take(np.arange(self.num_seen))


def no_pairs(dim: int) -> Pairs:
    """Zero pairs of width `dim`."""
    empty = np.zeros((0, dim), np.float32)
    return Pairs(empty, empty, np.zeros(0, np.int32))


_PARTS = ("train", "memory", "test", "questions", "captioned")
_ARRAYS = ("prompts", "splits", "caption_keys")


def save(folder: epath.Path, pairs: EmbeddedPairs) -> None:
    """Writes the arrays and `pairs.json` for `load`."""
    for part in _PARTS:
        for field, array in vars(getattr(pairs, part)).items():
            files.write_array(folder / f"{part}_{field}.npy", array)
    for name in _ARRAYS:
        files.write_array(folder / f"{name}.npy", getattr(pairs, name))
    metadata = {name: getattr(pairs, name) for name in ("num_seen", "towers", "split_names")}
    files.write_json(folder / METADATA, metadata)


def load(folder: epath.Path) -> EmbeddedPairs:
    """Loads what `save` wrote."""
    fields = [field.name for field in dataclasses.fields(Pairs)]
    values: dict[str, Any] = {
        part: Pairs(*(files.read_array(folder / f"{part}_{field}.npy") for field in fields))
        for part in _PARTS
    }
    values |= {name: files.read_array(folder / f"{name}.npy") for name in _ARRAYS}
    metadata = files.read_object(folder / METADATA, num_seen=int, towers=str, split_names=list)
    values |= {name: metadata[name] for name in ("num_seen", "towers", "split_names")}
    return EmbeddedPairs(**values | {"split_names": tuple(values["split_names"])})


@dataclasses.dataclass(frozen=True)
class PairsStageConfig:
    """Scenes, captions and prompts that are embedded.

    Attributes:
        seed: unused.
        world: world of the scenes.
        train_splits: splits whose scenes the fusion trains on.
        captions_per_image: captions of each training scene, with facts dropped at random.
        rare_repeats: factor by which `rare_seen` classes, which have a quarter of the scenes, get more
            captions.
        templates: prompt templates; a class is the mean of its prompts.
        max_test: maximum number of images to classify per split; the same for questions and captioned images.
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
            raise ValueError(
                f"train_splits are {self.train_splits}; choose from {', '.join(known)}"
            )
        if min(self.captions_per_image, self.rare_repeats, self.max_test) < 1:
            raise ValueError("captions_per_image, rare_repeats and max_test must be at least 1")
        zeroshot.prompts(["name"], self.templates)


def run(config: PairsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Embeds the scenes with the run's retriever.

    Returns:
        The numbers of pairs (`train`), memory rows (`memory`) and classes per split (`classes`).
    """
    encoder = train_retriever.load_encoder(run.workdir)
    memory = build_memory.open_memory(run)
    sources = [
        config.world.scenes("memory", *part) for part in (world_config.SEEN, world_config.HELD_OUT)
    ]
    memory_classes = np.concatenate([source.class_ids for source in sources])
    class_ids = config.world.classes(*class_splits.SPLITS)
    splits = np.minimum(class_splits.split_of(config.world.seed or 0)[class_ids], HELD_OUT_INDEX)
    index_of = {int(class_id): index for index, class_id in enumerate(class_ids)}
    to_indices = lambda ids: np.array([index_of[int(i)] for i in ids], np.int32)
    names = art.load_art().names
    texts = zeroshot.prompts([names[i][0] for i in class_ids], config.templates)
    tests = [config.world.scenes("test", split) for split in TESTED_SPLITS]
    pairs = EmbeddedPairs(
        train=_train(config, encoder, to_indices),
        memory=Pairs(
            memory.embeddings("image"), memory.embeddings("text"), to_indices(memory_classes)
        ),
        num_seen=len(sources[0]),
        towers=encoder.fingerprint,
        test=_sum(encoder.dim, (_test(config, encoder, source, to_indices) for source in tests)),
        prompts=encoder.encode_text(texts).reshape(len(class_ids), -1, encoder.dim),
        splits=splits.astype(np.int32),
        questions=_sum(
            encoder.dim, (_questions(config, encoder, source, to_indices) for source in tests)
        ),
        **_captioned(config, encoder, to_indices),
    )
    save(stage_dir, pairs)
    return {
        "train": len(pairs.train),
        "memory": len(pairs.memory),
        "classes": {
            name: int((pairs.splits == i).sum()) for i, name in enumerate(pairs.split_names)
        },
    }


def _sum(dim: int, parts: Iterable[Pairs]) -> Pairs:
    return sum(parts, no_pairs(dim))


def _train(
    config: PairsStageConfig, encoder: frozen.FrozenRetriever, to_indices: ToIndices
) -> Pairs:
    parts = []
    for split in config.train_splits:
        source = config.world.scenes("train", split)
        image, rows = encoder.encode_image(world_config.images(source)), range(len(source))
        repeats = config.rare_repeats if split == "rare_seen" else 1
        for number in range(config.captions_per_image * repeats):
            text = encoder.encode_text([source.caption(row, number) for row in rows])
            parts.append(Pairs(image, text, to_indices(source.class_ids)))
    return _sum(encoder.dim, parts)


def _test(
    config: PairsStageConfig,
    encoder: frozen.FrozenRetriever,
    source: emoji_scenes.Scenes,
    to_indices: ToIndices,
) -> Pairs:
    """Test scenes with one entity, since a scene with two has no single class."""
    alone = [row for row in range(len(source)) if len(source.facts(row).entities) == 1]
    rows = world_config.evenly_spaced(np.array(alone, np.int64), config.max_test)
    return _embed(encoder, source, rows, [source.caption(int(r), 0) for r in rows], to_indices)


def _questions(
    config: PairsStageConfig,
    encoder: frozen.FrozenRetriever,
    source: emoji_scenes.Scenes,
    to_indices: ToIndices,
) -> Pairs:
    """Questions for the entity at a place, as in OVEN, about scenes of levels with up to two entities."""
    candidates = [row for row, level in enumerate(source.levels) if level.max_entities == 2]
    rows = world_config.evenly_spaced(np.array(candidates, np.int64), config.max_test)
    if not len(rows):
        return no_pairs(encoder.dim)
    texts = [
        f"what is at the {emoji_scenes.place(source.facts(int(r)).entities[0], source.levels[r])}?"
        for r in rows
    ]
    return _embed(encoder, source, rows, texts, to_indices)


def _captioned(
    config: PairsStageConfig, encoder: frozen.FrozenRetriever, to_indices: ToIndices
) -> dict[str, Any]:
    hardest = dataclasses.replace(config.world, levels=config.world.levels[-1:])
    source = hardest.scenes("test", *TESTED_SPLITS)
    rows = world_config.evenly_spaced(np.arange(len(source)), config.max_test)
    texts = [source.full_caption(int(row)) for row in rows]
    keys = np.array([policy.fact_key(text) for text in texts], np.int64)
    return {
        "captioned": _embed(encoder, source, rows, texts, to_indices),
        "caption_keys": keys,
    }


def _embed(
    encoder: frozen.FrozenRetriever,
    source: emoji_scenes.Scenes,
    rows: np.ndarray,
    texts: list[str],
    to_indices: ToIndices,
) -> Pairs:
    image = encoder.encode_image(world_config.images(source, rows))
    return Pairs(image, encoder.encode_text(texts), to_indices(source.class_ids[rows]))
