"""Distance between two sets of pictures: unbiased squared MMD of their features (KID, CMMD).

KID is the cubic kernel of Binkowski et al. 2018, CMMD the Gaussian one of Jayasumana et al. 2024
with its bandwidth 10 on unit rows. Both are unbiased at any size, so a few hundred pictures give
a fair if noisy value (which may fall below 0). The Frechet distance is not offered: it is biased
upwards by thousands of pictures' worth, and needs a matrix square root (scipy) besides.
"""

from collections.abc import Callable

import numpy as np

from rag_mm.core.errors import UserError

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]

_BLOCK = 1024  # Rows of a kernel matrix held at once: 1024 x 30,000 float64 is 0.25 GB.


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 of float64 [N, D] and [M, D], as KID has it: [N, M]."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def gaussian_kernel(x: np.ndarray, y: np.ndarray, bandwidth: float = 10.0) -> np.ndarray:
    """exp(-|x - y|^2 / (2 bandwidth^2)) of float64 [N, D] and [M, D]: [N, M]."""
    squares = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)[None, :] - 2.0 * (x @ y.T)
    return np.exp(-np.maximum(squares, 0.0) / (2.0 * bandwidth**2))


def squared_mmd(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy, summed in float64.

    Args:
        x: floating features [N, D] of one set; N >= 2.
        y: floating features [M, D] of the other; M >= 2.
        kernel: maps float64 [n, D], [m, D] to [n, m].

    Returns:
        About 0 for two samples of one distribution; may be slightly negative.

    Raises:
        UserError: fewer than two rows in a set, or NaN or infinity among the features.
        ValueError: the widths differ.
    """
    x, y = _checked(x), _checked(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of width {x.shape[1]} cannot be compared with {y.shape[1]}")
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x, kernel) - _diagonal_sum(x, kernel)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y, kernel) - _diagonal_sum(y, kernel)) / (m * (m - 1))
    return within_x + within_y - 2.0 * _kernel_sum(x, y, kernel) / (n * m)


def kernel_distance(generated: np.ndarray, real: np.ndarray) -> dict[str, float | int]:
    """Both distances between the features of generated and of real pictures, in thousandths.

    Rows are brought to unit length, as the CMMD form wants them; for the cubic kernel they are
    stretched by sqrt(D), the length its 1/D expects, or it would see nothing but the mean.

    Args:
        generated: float32 [N, D] from the frozen image tower; N >= 2.
        real: float32 [M, D] of the originals; M >= 2.

    Returns:
        {"polynomial", "gaussian", "n"}, n being the smaller set's size.

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
            f"a distance between sets of pictures wants features [N, D] with at least 2 rows, "
            f"not {list(features.shape)}; evaluate more pictures."
        )
    if bad := int(np.sum(~np.isfinite(features).all(axis=1))):
        raise UserError(
            f"{bad} of {len(features)} feature rows hold NaN or infinity; "
            "train the retriever again with a lower learning rate."
        )
    return features


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _kernel_sum(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    starts = range(0, len(x), _BLOCK)
    return float(sum(kernel(x[start : start + _BLOCK], y).sum() for start in starts))


def _diagonal_sum(x: np.ndarray, kernel: Kernel) -> float:
    return float(sum(kernel(row[None], row[None])[0, 0] for row in x))
