"""Rows and queries for measuring an index: a cone of "images" and one of "texts", as CLIP has them.

Embeddings of the two modalities lie in two narrow cones apart from each other (Liang et al. 2022, arXiv
2203.02053), rows gather in clusters of very different sizes, and a few directions carry most of the
variance. A query is the text of something near one of the clusters, so it comes from outside the rows'
own distribution. Everything follows from the seed; rows are made in blocks, so that memory stays small.
"""

import dataclasses

import numpy as np

_BLOCK = 16_384


@dataclasses.dataclass(frozen=True)
class Cones:
    """A distribution of rows and queries.

    Attributes:
        dim: width.
        num_clusters: their sizes fall as 1 / rank^0.5.
        spectrum: standard deviations along rotated axes fall as 1 / i^spectrum.
        gap: length of each cone's mean beside a spread of 1.
        spread: how far rows lie from their cluster's centre, beside the centres' own spread of 1.
        seed: of everything.
    """

    dim: int = 512
    num_clusters: int = 2_000
    spectrum: float = 0.5
    gap: float = 1.0
    spread: float = 0.5
    seed: int = 0

    def rows(self, count: int) -> np.ndarray:
        """Unit rows of the image cone, float32 [count, dim]; the first rows do not depend on `count`."""
        return self._draw(count, kind=1)

    def queries(self, count: int) -> np.ndarray:
        """Unit rows of the text cone, float32 [count, dim]."""
        return self._draw(count, kind=2)

    def _draw(self, count: int, kind: int) -> np.ndarray:
        scales, means, centres, rotation = self._shape()
        sizes = 1 / np.sqrt(np.arange(1, self.num_clusters + 1))
        drawn = np.empty((count, self.dim), np.float32)
        for start in range(0, count, _BLOCK):
            rng = np.random.default_rng((self.seed, kind, start))
            clusters = rng.choice(self.num_clusters, _BLOCK, p=sizes / sizes.sum())
            noise = rng.standard_normal((_BLOCK, self.dim), np.float32) * (scales * self.spread)
            block = (centres[clusters] + noise) @ rotation + means[kind - 1]
            block /= np.linalg.norm(block, axis=1, keepdims=True)
            drawn[start : start + _BLOCK] = block[: count - start]
        return drawn

    def _shape(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Scales [dim] of variance 1 in all, means [2, dim], centres [clusters, dim], a rotation."""
        rng = np.random.default_rng((self.seed, 0))
        scales = np.arange(1, self.dim + 1, dtype=np.float64) ** -self.spectrum
        scales = (scales / np.linalg.norm(scales)).astype(np.float32)
        means = rng.standard_normal((2, self.dim), np.float32)
        means *= self.gap / np.linalg.norm(means, axis=1, keepdims=True)
        centres = rng.standard_normal((self.num_clusters, self.dim), np.float32) * scales
        rotation, _ = np.linalg.qr(rng.standard_normal((self.dim, self.dim)))
        return scales, means, centres, rotation.astype(np.float32)
