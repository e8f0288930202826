"""Means, accuracies and paired differences with 95 % confidence intervals.

Every sampled metric in `metrics.json` has one of two forms, `{"accuracy", "ci95", "n"}` or
`{"mean", "ci95", "n"}`; `ci95` is the half width of the 95 % interval. Claims rest on paired differences
and their standard errors, because every variant is evaluated on the same test documents.

scipy.stats takes about a second to import, so only the functions that need it do.
"""

import math
import statistics

import numpy as np
import numpy.typing as npt

from rag_mm.core.errors import UserError

Z95 = statistics.NormalDist().inv_cdf(0.975)


def _finite(values: npt.ArrayLike, what: str, at_least: int) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise ValueError(f"{what}: expected one value per document, got shape {array.shape}")
    if array.size < at_least:
        raise UserError(
            f"{what}: {array.size} documents are too few; evaluate at least {at_least}."
        )
    if bad := int(np.sum(~np.isfinite(array))):
        raise UserError(
            f"{what}: {bad} of {array.size} values are NaN or infinite: the model has diverged; "
            "retrain it with a lower learning rate."
        )
    return array


def accuracy(hits: npt.ArrayLike, what: str = "accuracy") -> dict[str, float | int]:
    """Fraction of hits, with a half width that covers its 95 % Wilson interval.

    The half width is the distance from the fraction to the farther end of the interval. It matches the
    normal interval near 0.5 and stays above zero at 0 and 1.

    Args:
        hits: bool [N], or numbers that are 0 or 1.
        what: name used in errors.

    Returns:
        {"accuracy", "ci95", "n"}, accuracy in [0, 1].

    Raises:
        UserError: `hits` is empty, or contains NaN.
        ValueError: a value other than 0 and 1.
    """
    from scipy import stats

    array = _finite(hits, what, at_least=1)
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError(f"{what}: a hit is 0 or 1, not {array[~np.isin(array, (0, 1))][0]}")
    share = float(array.mean())
    interval = stats.binomtest(int(array.sum()), array.size).proportion_ci(0.95, method="wilson")
    half_width = float(max(interval.high - share, share - interval.low))
    return {"accuracy": share, "ci95": half_width, "n": array.size}


def mean(values: npt.ArrayLike, what: str = "mean") -> dict[str, float | int]:
    """Mean over documents with a normal 95 % interval (too narrow below about 30 documents).

    Args:
        values: float [N], one per document; N >= 2.
        what: name used in errors.

    Returns:
        {"mean", "ci95", "n"} in the unit of the values.

    Raises:
        UserError: fewer than two values, or non-finite ones.
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


def student_t95(num_values: int) -> float:
    """97.5 % quantile of Student's t for the mean of `num_values` >= 2 values."""
    from scipy import stats

    return float(stats.t.ppf(0.975, df=num_values - 1))


def paired_difference(
    ours: npt.ArrayLike, theirs: npt.ArrayLike, what: str = "paired difference"
) -> dict[str, float | int]:
    """Mean of `ours - theirs` over the same documents in the same order.

    Args:
        ours: float or bool [N], one value per document; N >= 2.
        theirs: [N], the other variant's values for the same documents.
        what: name used in errors.

    Returns:
        {"mean", "standard_error", "ci95", "n"}; a claim requires |mean| > 2 standard_error.

    Raises:
        UserError: fewer than two documents, or non-finite values.
        ValueError: the two have different numbers of documents.
    """
    left = _finite(ours, what, at_least=2)
    right = _finite(theirs, what, at_least=2)
    if left.size != right.size:
        raise ValueError(f"{what}: {left.size} documents cannot be paired with {right.size}")
    difference = left - right
    return mean(difference, what) | {"standard_error": standard_error(difference, what)}


def ratio_of_means(
    ours: npt.ArrayLike, theirs: npt.ArrayLike, what: str = "ratio"
) -> dict[str, float | int]:
    """mean(ours) / mean(theirs) over the same documents in the same order.

    Args:
        ours: float [N], one value per document; N >= 2.
        theirs: float [N] of a mean above 0, the other variant's values for the same documents.
        what: name used in errors.

    Returns:
        {"mean", "ci95", "n"}; the interval is the delta method's.

    Raises:
        UserError: fewer than two documents, or non-finite values.
        ValueError: the two have different numbers of documents.
    """
    left, right = (_finite(each, what, at_least=2) for each in (ours, theirs))
    if left.size != right.size:
        raise ValueError(f"{what}: {left.size} documents cannot be paired with {right.size}")
    ratio = float(left.mean() / right.mean())
    error = standard_error(left - ratio * right, what) / float(right.mean())
    return {"mean": ratio, "ci95": Z95 * error, "n": left.size}
