"""Distance between two sets of images: unbiased squared MMD of their features (KID, CMMD).

KID uses the cubic kernel of Binkowski et al. 2018, CMMD the Gaussian kernel of Jayasumana et al. 2024 with
bandwidth 10 on unit vectors. Both estimates are unbiased at any sample size, so a few hundred images give a
noisy but fair value, which may be negative. The Frechet distance (FID) is left out because it is biased
upwards for sets of fewer than thousands of images.
"""

from collections.abc import Callable

import numpy as np

from rag_mm.core.errors import UserError

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

_BLOCK = 1024  # Rows of the kernel matrix in memory at once: 1024 x 30,000 float64 is 0.25 GB.


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's kernel, (x.y / D + 1)^3, of float64 [N, D] and [M, D]: [N, M]."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray, bandwidth: float = 10.0) -> np.ndarray:
    """exp(-|x - y|^2 / (2 bandwidth^2)) of float64 [N, D] and [M, D]: [N, M]."""
    squares = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)[None, :] - 2.0 * (x @ y.T)
    return np.exp(-np.maximum(squares, 0.0) / (2.0 * bandwidth**2))


def squared_mmd(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy, summed in float64.

    Args:
        x: float [N, D], features of one set; N >= 2.
        y: float [M, D], features of the other; M >= 2.
        kernel: maps float64 [n, D], [m, D] to [n, m].

    Returns:
        About 0 for two samples of the same distribution; may be slightly negative.

    Raises:
        UserError: fewer than two images in a set, or non-finite features.
        ValueError: the feature dimensions differ.
    """
    x, y = _checked(x), _checked(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared")
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x, kernel) - _diagonal_sum(x, kernel)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y, kernel) - _diagonal_sum(y, kernel)) / (m * (m - 1))
    return within_x + within_y - 2.0 * _kernel_sum(x, y, kernel) / (n * m)


def kernel_distance(generated: np.ndarray, real: np.ndarray) -> dict[str, float | int]:
    """Both distances between generated and real images, times 1,000.

    Features are normalized to unit length, as CMMD requires. For the cubic kernel they are then scaled by
    sqrt(D), the length that its 1/D assumes; without that it would compare little more than the means.

    Args:
        generated: float32 [N, D], features from the frozen image encoder; N >= 2.
        real: float32 [M, D], features of the originals; M >= 2.

    Returns:
        {"polynomial", "gaussian", "n"}; n is the size of the smaller set.

    Raises:
        UserError, ValueError: as `squared_mmd`.
    """
    x, y = _unit(_checked(generated)), _unit(_checked(real))
    stretch = np.sqrt(x.shape[1])
    return {
        "polynomial": 1000.0 * squared_mmd(x * stretch, y * stretch, polynomial_kernel),
        "gaussian": 1000.0 * squared_mmd(x, y, gaussian_kernel),
        "n": min(len(x), len(y)),
    }


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(
            f"a distance between sets of images needs features [N, D] with at least 2 rows, "
            f"got {list(features.shape)}; evaluate more images."
        )
    if bad := int(np.sum(~np.isfinite(features).all(axis=1))):
        raise UserError(
            f"{bad} of {len(features)} feature rows contain NaN or infinity; "
            "retrain the retriever with a lower learning rate."
        )
    return features


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _kernel_sum(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    starts = range(0, len(x), _BLOCK)
    return float(sum(kernel(x[start : start + _BLOCK], y).sum() for start in starts))


def _diagonal_sum(x: np.ndarray, kernel: Kernel) -> float:
    return float(sum(kernel(row[None], row[None])[0, 0] for row in x))
