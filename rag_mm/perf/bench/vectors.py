"""Synthetic rows and queries for index benchmarks: an "image" cone and a "text" cone, like CLIP embeddings.

Embeddings of the two modalities lie in separate narrow cones (Liang et al. 2022, arXiv 2203.02053), rows form
clusters of very different sizes, and a few directions carry most of the variance. A query is a text near one
of the clusters, so queries are out of distribution for the rows. Everything is deterministic given the seed;
rows are generated in blocks to limit memory.
"""

import dataclasses

import numpy as np

_BLOCK = 16_384


@dataclasses.dataclass(frozen=True)
class Cones:
    """A distribution of rows and queries.

    Attributes:
        dim: embedding dimension.
        num_clusters: number of clusters; their sizes fall as 1 / rank^0.5.
        spectrum: standard deviations along rotated axes fall as 1 / i^spectrum.
        gap: norm of each cone's mean, relative to the spread of the cluster centres.
        spread: spread of rows around their cluster centre, relative to that of the centres.
        seed: random seed.
    """

    dim: int = 512
    num_clusters: int = 2_000
    spectrum: float = 0.5
    gap: float = 1.0
    spread: float = 0.5
    seed: int = 0

    def rows(self, count: int) -> np.ndarray:
        """Unit vectors of the image cone, float32 [count, dim]; the first rows do not depend on `count`."""
        return self._sample(count, kind=1)

    def queries(self, count: int) -> np.ndarray:
        """Unit vectors of the text cone, float32 [count, dim]."""
        return self._sample(count, kind=2)

    def _sample(self, count: int, kind: int) -> np.ndarray:
        scales, means, centres, rotation = self._parameters()
        sizes = 1 / np.sqrt(np.arange(1, self.num_clusters + 1))
        samples = np.empty((count, self.dim), np.float32)
        for start in range(0, count, _BLOCK):
            rng = np.random.default_rng((self.seed, kind, start))
            clusters = rng.choice(self.num_clusters, _BLOCK, p=sizes / sizes.sum())
            noise = rng.standard_normal((_BLOCK, self.dim), np.float32) * (scales * self.spread)
            block = (centres[clusters] + noise) @ rotation + means[kind - 1]
            block /= np.linalg.norm(block, axis=1, keepdims=True)
            samples[start : start + _BLOCK] = block[: count - start]
        return samples

    def _parameters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Scales [dim] of total variance 1, means [2, dim], centres [clusters, dim], rotation [dim, dim]."""
        rng = np.random.default_rng((self.seed, 0))
        scales = np.arange(1, self.dim + 1, dtype=np.float64) ** -self.spectrum
        scales = (scales / np.linalg.norm(scales)).astype(np.float32)
        means = rng.standard_normal((2, self.dim), np.float32)
        means *= self.gap / np.linalg.norm(means, axis=1, keepdims=True)
        centres = rng.standard_normal((self.num_clusters, self.dim), np.float32) * scales
        rotation, _ = np.linalg.qr(rng.standard_normal((self.dim, self.dim)))
        return scales, means, centres, rotation.astype(np.float32)
