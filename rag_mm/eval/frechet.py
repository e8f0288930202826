"""Fréchet distance between the features of two sets of images (Heusel et al. 2017, arXiv 1706.08500).

With the features of the public Inception it is the FID; with those of another encoder it compares only sets
that the same encoder has seen. It is biased upwards for few images: compare equal numbers.
"""

import numpy as np
from jaxtyping import Float

from rag_mm.core.errors import UserError


def frechet_distance(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> float:
    """|mean difference|^2 + trace(Cx + Cy - 2 (Cx Cy)^(1/2)) of Gaussians fitted to both sets, in float64.

    Raises:
        UserError: a set has fewer than two rows, or features are not finite.
    """
    sets = [np.asarray(each, np.float64) for each in (x, y)]
    if min(map(len, sets)) < 2 or not all(np.isfinite(each).all() for each in sets):
        raise UserError("A Fréchet distance needs two finite feature rows or more on both sides.")
    means = [each.mean(0) for each in sets]
    roots = [
        np.asarray(np.linalg.qr((each - mean) / np.sqrt(len(each) - 1), mode="r"), np.float64)
        for each, mean in zip(sets, means, strict=True)
    ]  # Rx with Rx^T Rx = Cx: the eigenvalues of Cx Cy are the squared singular values of Rx Ry^T.
    both = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    spread = sum(float(np.square(each).sum()) for each in roots)
    return max(float(np.square(means[0] - means[1]).sum() + spread - 2 * both), 0.0)
