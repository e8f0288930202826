"""Concepts: a toy world of embeddings in which images find images, texts find texts, and the two do not meet.

Classes are centers in groups of close ones. An image lies near its class's center. A text of a *common* class
lies near the same one, as after contrastive training; that of a *rare* class lies near another vector, so it
can be found by its like and by nothing else (docs/papers/reco.md#acceptance). A part of the rare classes is
held out: it may stand in a memory and is shown in no training.
"""

import dataclasses

import numpy as np

SPLITS = ("common", "rare_seen", "held_out")


@dataclasses.dataclass(frozen=True)
class ConceptWorld:
    """What the world is like.

    Attributes:
        num_classes: classes in all splits.
        group_size: classes whose centers are close together.
        num_common: common classes; those neither common nor held out are rare and seen.
        num_held_out: classes that no training shows.
        dim: width of an embedding.
        noise_std: standard deviation of an embedding in each dimension.
        class_spread: distance of a class from its group's center; less makes classes confusable.
        agreement: how much of the image's center the text of a rare class has.
        modality_offset: length of a vector that all images share, and of another one for all texts.
        wrong_captions: share of a memory's texts that belong to another class of the group.
    """

    num_classes: int = 200
    group_size: int = 5
    num_common: int = 100
    num_held_out: int = 30
    dim: int = 64
    noise_std: float = 0.11
    class_spread: float = 0.8
    agreement: float = 0.35
    modality_offset: float = 0.0
    wrong_captions: float = 0.0

    def __post_init__(self):
        if self.group_size < 2 or self.num_classes % self.group_size or self.dim < 2:
            raise ValueError("group_size is at least 2 and divides num_classes; dim is at least 2")
        if min(self.num_common, self.num_held_out) < 1 or not (
            self.num_common + self.num_held_out < self.num_classes
        ):
            raise ValueError("there are common, seen rare and held-out classes, at least one each")
        if not 0 <= self.wrong_captions <= 1:
            raise ValueError(f"wrong_captions is {self.wrong_captions}, give 0 to 1")
        if self.noise_std < 0 or self.class_spread <= 0 or self.modality_offset < 0:
            raise ValueError("noise_std and modality_offset are at least 0, class_spread more than 0")


class Concepts:
    """The classes of one seed.

    Attributes:
        splits: int64 [C], an index into `SPLITS`.
        groups: int64 [C], which classes lie close together.
    """

    def __init__(self, config: ConceptWorld, seed: int):
        """Draws the classes."""
        self.config = c = config
        rng = np.random.default_rng((seed, 0))
        self.groups = np.arange(c.num_classes) // c.group_size
        middles = _unit(rng.standard_normal((c.num_classes // c.group_size, c.dim)))
        apart = _unit(rng.standard_normal((c.num_classes, c.dim)))
        self._image_centers = _unit(middles[self.groups] + c.class_spread * apart)
        num_seen = c.num_classes - c.num_held_out
        rank = rng.permutation(c.num_classes)
        self.splits = (rank >= c.num_common).astype(np.int64) + (rank >= num_seen)
        rare = _unit(
            c.agreement * self._image_centers + _unit(rng.standard_normal((c.num_classes, c.dim)))
        )
        is_common = (self.splits == 0)[:, None]
        self._text_centers = np.where(is_common, self._image_centers, rare)
        self._image_offset, self._text_offset = c.modality_offset * _unit(
            rng.standard_normal((2, c.dim))
        )

    def classes(self, *names: str) -> np.ndarray:
        """Ids of the splits' classes, int64, ascending."""
        return np.flatnonzero(np.isin(self.splits, [SPLITS.index(name) for name in names]))

    def images(self, class_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An embedding of an image of each class: unit rows, float32 [N, D]."""
        return self._draw(self._image_centers[class_ids], self._image_offset, rng)

    def texts(self, class_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An embedding of a text about each class: unit rows, float32 [N, D]."""
        return self._draw(self._text_centers[class_ids], self._text_offset, rng)

    def captioned_as(self, class_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The classes that captions in a memory tell of, int64 [N]: some are wrong."""
        size = self.config.group_size
        others = (
            class_ids // size * size + (class_ids + rng.integers(1, size, len(class_ids))) % size
        )
        is_wrong = rng.random(len(class_ids)) < self.config.wrong_captions
        return np.where(is_wrong, others, class_ids)

    def _draw(
        self, centers: np.ndarray, offset: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        noise = self.config.noise_std * rng.standard_normal(centers.shape)
        return _unit(centers + noise + offset).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
