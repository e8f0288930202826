"""Figures with their uncertainty: means, accuracies and paired differences (RA-CM3 section 8).

Every figure in `metrics.json` that is a sample has one of two forms, `{"accuracy", "ci95", "n"}`
or `{"mean", "ci95", "n"}`; `ci95` is the half width of the 95 % interval. A claim is decided on
a paired difference and its standard error, because the same test documents meet every variant.
"""

import math

import numpy as np
import numpy.typing as npt

from rag_mm.core.errors import UserError

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution.


def _finite(values: npt.ArrayLike, what: str, at_least: int) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise ValueError(f"{what}: one figure a document is wanted, not shape {array.shape}")
    if array.size < at_least:
        raise UserError(
            f"{what}: {array.size} documents are too few, evaluate at least {at_least}."
        )
    if bad := int(np.sum(~np.isfinite(array))):
        raise UserError(
            f"{what}: {bad} of {array.size} figures are NaN or infinite, so the model behind them "
            "has diverged; train it again with a lower learning rate."
        )
    return array


def accuracy(hits: npt.ArrayLike, what: str = "accuracy") -> dict[str, float | int]:
    """Share of hits.

    The half width is the distance from the share to the farther end of its Wilson interval: it
    agrees with the usual normal one in the middle and does not claim certainty at 0 or 1.

    Args:
        hits: bool [N], or figures that are 0 or 1.
        what: name used in errors.

    Returns:
        {"accuracy", "ci95", "n"}, accuracy in [0, 1].

    Raises:
        UserError: no hits at all, or NaN among them.
        ValueError: a value other than 0 and 1.
    """
    array = _finite(hits, what, at_least=1)
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError(f"{what}: a hit is 0 or 1, not {array[~np.isin(array, (0, 1))][0]}")
    n = array.size
    share = float(array.mean())
    center = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return {"accuracy": share, "ci95": half + abs(center - share), "n": n}


def mean(values: npt.ArrayLike, what: str = "mean") -> dict[str, float | int]:
    """Mean over documents with a normal 95 % interval (too narrow below about 30 documents).

    Args:
        values: float [N], one figure a document; N >= 2.
        what: name used in errors.

    Returns:
        {"mean", "ci95", "n"} in the unit of the values.

    Raises:
        UserError: fewer than two values, or NaN or infinity among them.
    """
    array = _finite(values, what, at_least=2)
    return {
        "mean": float(array.mean()),
        "ci95": Z95 * standard_error(array, what),
        "n": array.size,
    }


def standard_error(values: npt.ArrayLike, what: str = "standard error") -> float:
    """Standard error of the mean of float [N], N >= 2; raises as `mean` does."""
    array = _finite(values, what, at_least=2)
    return float(array.std(ddof=1) / math.sqrt(array.size))


def paired_difference(
    ours: npt.ArrayLike, theirs: npt.ArrayLike, what: str = "paired difference"
) -> dict[str, float | int]:
    """Mean of `ours - theirs` over the same documents in the same order.

    Args:
        ours: float or bool [N], one figure a document; N >= 2.
        theirs: the same documents under the other variant, [N].
        what: name used in errors.

    Returns:
        {"mean", "standard_error", "ci95", "n"}; a claim wants |mean| > 2 standard_error.

    Raises:
        UserError: fewer than two documents, or NaN or infinity among the figures.
        ValueError: the two do not hold the same number of documents.
    """
    left = _finite(ours, what, at_least=2)
    right = _finite(theirs, what, at_least=2)
    if left.size != right.size:
        raise ValueError(f"{what}: {left.size} documents cannot be paired with {right.size}")
    difference = left - right
    return mean(difference, what) | {"standard_error": standard_error(difference, what)}
