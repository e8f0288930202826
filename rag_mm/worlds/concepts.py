"""Concepts: synthetic embeddings whose rare classes can be retrieved only within a modality.

Each class has a center; classes of one group have similar centers. Images are noisy copies of their class's
center. Texts of a *common* class share that center, as after contrastive training. Texts of a *rare* class
have another center, so only texts of the same class are close to them (docs/papers/reco.md#acceptance). Some
rare classes are held out: they may occur in a memory but never in training.
"""

import dataclasses

import numpy as np

SPLITS = ("common", "rare_seen", "held_out")


@dataclasses.dataclass(frozen=True)
class ConceptWorld:
    """Configuration of the world.

    Attributes:
        num_classes: classes in all splits.
        group_size: classes whose centers are close together.
        num_common: common classes; those neither common nor held out are rare and seen.
        num_held_out: held-out classes, never used in training.
        dim: embedding dimension.
        noise_std: standard deviation of an embedding in each dimension.
        class_spread: distance of a class from its group's center; smaller values make classes confusable.
        agreement: weight of the image center in the text center of a rare class.
        modality_offset: length of a vector added to all images, and of another one added to all texts.
        wrong_captions: fraction of a memory's texts that describe another class of the same group.
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
            raise ValueError(f"wrong_captions is {self.wrong_captions}; give 0 to 1")
        if self.noise_std < 0 or self.class_spread <= 0 or self.modality_offset < 0:
            raise ValueError(
                "noise_std and modality_offset are at least 0, class_spread more than 0"
            )


class Concepts:
    """The classes of one seed.

    Attributes:
        splits: int64 [C], indices into `SPLITS`.
        groups: int64 [C], the group of each class.
    """

    def __init__(self, config: ConceptWorld, seed: int):
        """Samples the classes."""
        self.config = c = config
        rng = np.random.default_rng((seed, 0))
        self.groups = np.arange(c.num_classes) // c.group_size
        group_means = _unit(rng.standard_normal((c.num_classes // c.group_size, c.dim)))
        class_offsets = _unit(rng.standard_normal((c.num_classes, c.dim)))
        self._image_centers = _unit(group_means[self.groups] + c.class_spread * class_offsets)
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
        """Ids of the classes in the named splits, int64, ascending."""
        return np.flatnonzero(np.isin(self.splits, [SPLITS.index(name) for name in names]))

    def images(self, class_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One image embedding per class id: unit vectors, float32 [N, D]."""
        return self._sample(self._image_centers[class_ids], self._image_offset, rng)

    def texts(self, class_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One text embedding per class id: unit vectors, float32 [N, D]."""
        return self._sample(self._text_centers[class_ids], self._text_offset, rng)

    def captioned_as(self, class_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The classes that a memory's captions describe, int64 [N]; some are wrong."""
        size = self.config.group_size
        others = (
            class_ids // size * size + (class_ids + rng.integers(1, size, len(class_ids))) % size
        )
        is_wrong = rng.random(len(class_ids)) < self.config.wrong_captions
        return np.where(is_wrong, others, class_ids)

    def _sample(
        self, centers: np.ndarray, offset: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        noise = self.config.noise_std * rng.standard_normal(centers.shape)
        return _unit(centers + noise + offset).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
