"""The worlds of a run's documents: emoji scenes, the user's images, a corpus, or toy embeddings."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from rag_mm.core import checks, configuration
from rag_mm.core.document_types import Document
from rag_mm.stages.shared.corpus_world import CorpusWorld
from rag_mm.stages.shared.own_images import OwnImages
from rag_mm.worlds import concepts
from rag_mm.worlds.emoji import class_splits, emoji_scenes

SEEN = ("common", "rare_seen")
HELD_OUT = ("held_out",)
TUNE = ("tune",)  # The held-out classes on which checks and choices are made,
TEST = ("test",)  # and those on which results are measured.


class SplitDocuments(Protocol):
    """Interface of the documents of some splits in one role, as the stages use it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...

    def image(self, index: int) -> np.ndarray:
        """The image of a document, uint8 [S, S, 3]."""
        ...

    def caption(self, index: int, caption_index: int) -> str:
        """Caption variant `caption_index` (any int >= 0) of a document; facts may be missing."""
        ...

    def full_caption(self, index: int) -> str:
        """The caption that states all facts."""
        ...

    def entity_mask(self, index: int) -> np.ndarray:
        """The pixels that show an entity of the caption: bool [S, S]; the codes there are art codes."""
        ...


@dataclasses.dataclass(frozen=True)
class EmojiWorld:
    """Emoji scenes; with several levels, every class has scenes of each level.

    Attributes:
        levels: easy | pairs | sizes | off_grid | free, one or more.
        class_share: share of the classes of each split that is used, also as partners in pairs.
        seed: seed of the split of the classes, of the scenes and of the captions; None for the run's seed.
    """

    levels: tuple[str, ...] = ("easy",)
    class_share: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        known = ", ".join(emoji_scenes.LEVELS)
        if not self.levels:
            raise ValueError(f"levels is empty; choose from {known}")
        for name in self.levels:
            if name not in emoji_scenes.LEVELS:
                raise ValueError(f"unknown level {name!r}; choose from {known}")
        if not 0 < self.class_share <= 1:
            raise ValueError(f"class_share is {self.class_share}; give more than 0 and at most 1")
        if self.seed is not None:
            checks.at_least(self, 0, "seed")

    def classes(self, *split_names: str) -> np.ndarray:
        """Class ids of the splits, int64 [C]."""
        seed, share = self.seed or 0, self.class_share
        return np.concatenate(
            [class_splits.classes(name, seed=seed, share=share) for name in split_names]
        )

    def scenes(self, role: str, *split_names: str) -> emoji_scenes.Scenes:
        """The documents of some splits in one role: memory, train or test."""
        ids, seed = self.classes(*split_names), self.seed or 0
        return emoji_scenes.Scenes(self.levels, ids, role, seed, self.class_share)

    @property
    def geometry(self) -> emoji_scenes.Level:
        """The first level, for the properties that all levels share: image size and names of places."""
        return emoji_scenes.LEVELS[self.levels[0]]

    @property
    def image_size(self) -> int:
        """Image height and width in pixels."""
        return self.geometry.image_size


NAMES = {
    EmojiWorld: "emoji scenes",
    OwnImages: "the user's images, which have no facts to score",
    CorpusWorld: "a corpus, which has no images",
    concepts.ConceptWorld: "a toy world of embeddings",
}


def world_class(
    values: Mapping[str, Any],
) -> type[EmojiWorld | OwnImages | CorpusWorld | concepts.ConceptWorld]:
    """The class of a config's `world`.

    `OwnImages` if it has `documents`, `CorpusWorld` if it has `corpus`, `ConceptWorld` if it has a setting of
    that class, else `EmojiWorld`.
    """
    if "documents" in values:
        return OwnImages
    if "corpus" in values:
        return CorpusWorld
    toy_settings = {field.name for field in dataclasses.fields(concepts.ConceptWorld)}
    return concepts.ConceptWorld if toy_settings & set(values) else EmojiWorld


def make(
    values: Mapping[str, Any], seed: int = 0
) -> EmojiWorld | OwnImages | CorpusWorld | concepts.ConceptWorld:
    """The world that a config's `world` describes; emoji scenes without a seed get the run's `seed`.

    Raises:
        UserError: a setting is unknown, or its value is invalid.
    """
    world = configuration.make(world_class(values), values, "world")
    if isinstance(world, EmojiWorld) and world.seed is None:
        world = dataclasses.replace(world, seed=seed)
    return world


def images(source: SplitDocuments, rows: np.ndarray | None = None) -> np.ndarray:
    """Images of some rows (all if None): uint8 [R, H, W, 3]."""
    rows = np.arange(len(source)) if rows is None else rows
    return np.stack([source.image(int(row)) for row in rows])


def evenly_spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the sorted `rows`, evenly spaced, so that all splits and classes are represented."""
    count = min(count, len(rows))
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def sample_rows(source: SplitDocuments, count: int, seed: int) -> np.ndarray:
    """At most `count` distinct random rows, sorted: int64 [R], the same for the same seed."""
    order = np.random.default_rng((seed, len(source))).permutation(len(source))
    return np.sort(order[:count])
