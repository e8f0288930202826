"""The world a run lives in: emoji scenes (classes, levels, splits, roles), or pictures of one's own."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from rag_mm.core import configuration
from rag_mm.core.document_types import Document
from rag_mm.stages.shared.own_images import OwnImages
from rag_mm.worlds import concepts
from rag_mm.worlds.emoji import class_splits, emoji_scenes

SEEN = ("common", "rare_seen")
HELD_OUT = ("held_out",)


class SplitDocuments(Protocol):
    """Documents of one split and role, as the stages read them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...

    def picture(self, index: int) -> np.ndarray:
        """uint8 [S, S, 3]."""
        ...

    def caption(self, index: int, draw: int) -> str:
        """A caption that may leave out facts; `draw` is any count."""
        ...

    def full_caption(self, index: int) -> str:
        """All that a caption can tell."""
        ...

    def entity_mask(self, index: int, patch: int = 4) -> np.ndarray:
        """Codes that show what the caption names, bool [S / patch, S / patch]."""
        ...


@dataclasses.dataclass(frozen=True)
class EmojiWorld:
    """Emoji scenes; with several levels, each class has scenes of all of them.

    Attributes:
        levels: easy | pairs | sizes | off_grid | free, one or more.
        class_share: share of every split's classes that is kept, as partners in pairs, too.
    """

    levels: tuple[str, ...] = ("easy",)
    class_share: float = 1.0

    def __post_init__(self):
        known = ", ".join(emoji_scenes.LEVELS)
        if not self.levels:
            raise ValueError(f"there are no levels, choose from {known}")
        for name in self.levels:
            if name not in emoji_scenes.LEVELS:
                raise ValueError(f"there is no level {name!r}, choose from {known}")
        if not 0 < self.class_share <= 1:
            raise ValueError(f"class_share is {self.class_share}, give more than 0 and at most 1")

    def classes(self, *split_names: str) -> np.ndarray:
        """Class ids, int64, of the splits."""
        return np.concatenate(
            [class_splits.classes(name, share=self.class_share) for name in split_names]
        )

    def scenes(self, role: str, *split_names: str) -> emoji_scenes.Scenes:
        """Documents of the splits in one role: memory, train or test."""
        ids = self.classes(*split_names)
        return emoji_scenes.Scenes(self.levels, ids, role, class_share=self.class_share)

    @property
    def geometry(self) -> emoji_scenes.Level:
        """A level for what all of them share, the size of a picture and the names of places."""
        return emoji_scenes.LEVELS[self.levels[0]]

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.geometry.image_size


NAMES = {
    EmojiWorld: "emoji scenes",
    OwnImages: "the user's images, which come without facts to score by",
    concepts.ConceptWorld: "a toy world of embeddings",
}


def world_class(values: Mapping[str, Any]) -> type[EmojiWorld | OwnImages | concepts.ConceptWorld]:
    """The class of a config's `world`: `OwnImages` where it names documents, a toy world where it has a
    setting of one, else emoji scenes.
    """
    if "documents" in values:
        return OwnImages
    toy_settings = {field.name for field in dataclasses.fields(concepts.ConceptWorld)}
    return concepts.ConceptWorld if toy_settings & set(values) else EmojiWorld


def make(values: Mapping[str, Any]) -> EmojiWorld | OwnImages | concepts.ConceptWorld:
    """The world that a config's `world` describes.

    Raises:
        UserError: an unknown setting, or a value that the world refuses.
    """
    return configuration.make(world_class(values), values, "world")


def images(source: SplitDocuments, rows: np.ndarray | None = None) -> np.ndarray:
    """Pictures of the given rows (all if None): uint8 [R, H, W, 3]."""
    rows = np.arange(len(source)) if rows is None else rows
    return np.stack([source.picture(int(row)) for row in rows])


def evenly_spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of sorted rows, evenly spaced: a share of every split and kind of class."""
    count = min(count, len(rows))
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def sample_rows(source: SplitDocuments, count: int, seed: int) -> np.ndarray:
    """At most `count` distinct rows, the same for the same seed, sorted."""
    order = np.random.default_rng((seed, len(source))).permutation(len(source))
    return np.sort(order[:count])
