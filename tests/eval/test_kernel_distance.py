"""Unbiased MMD against the definition written as loops."""

import math

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.eval import kernel_distance


def naive_mmd(x, y, kernel):
    """The definition: means over ordered pairs of different rows, and over all cross pairs."""
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    return xx + yy - 2 * xy


def naive_polynomial(a, b):
    return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3


def naive_gaussian(a, b):
    return math.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / 200.0)


def samples(seed, n, shift=0.0, width=5):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, width)) + shift).astype(np.float32)


@pytest.mark.parametrize(
    ("kernel", "naive"),
    [
        (kernel_distance.polynomial_kernel, naive_polynomial),
        (kernel_distance.gaussian_kernel, naive_gaussian),
    ],
)
def test_agrees_with_loops(kernel, naive):
    x, y = samples(0, 7), samples(1, 9, shift=0.5)
    assert kernel_distance.squared_mmd(x, y, kernel) == pytest.approx(
        naive_mmd(x, y, naive), rel=1e-9
    )


def test_blocks_change_nothing(monkeypatch):
    x, y = samples(0, 23), samples(1, 17)
    whole = kernel_distance.squared_mmd(x, y, kernel_distance.polynomial_kernel)
    monkeypatch.setattr(kernel_distance, "_BLOCK", 4)
    parts = kernel_distance.squared_mmd(x, y, kernel_distance.polynomial_kernel)
    assert parts == pytest.approx(whole, rel=1e-9)


def test_unbiased_zero_on_average_for_one_distribution_and_grows_with_the_shift():
    kernel = kernel_distance.gaussian_kernel
    same = [
        kernel_distance.squared_mmd(samples(i, 20), samples(1000 + i, 20), kernel)
        for i in range(200)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(len(same))
    assert min(same) < 0 < max(same)
    near, far = (
        kernel_distance.squared_mmd(samples(0, 50), samples(1, 50, shift), kernel)
        for shift in (0.5, 2.0)
    )
    assert 0 < near < far


def test_float32_features_are_summed_in_float64():
    x = samples(0, 40) + np.float32(1000.0)  # In float32 the squares would cancel to noise.
    y = samples(1, 40) + np.float32(1000.0)
    expected = kernel_distance.squared_mmd(
        x.astype(np.float64) - 1000.0, y.astype(np.float64) - 1000.0,
        kernel_distance.gaussian_kernel,
    )  # fmt: skip
    actual = kernel_distance.squared_mmd(x, y, kernel_distance.gaussian_kernel)
    assert actual == pytest.approx(expected, abs=1e-7)


def test_both_distances_do_not_depend_on_row_length():
    x, y = samples(0, 30), samples(1, 30, shift=1.0)
    distance = kernel_distance.kernel_distance(x, y)
    assert set(distance) == {"polynomial", "gaussian", "n"} and distance["n"] == 30
    assert distance["polynomial"] > 0 and distance["gaussian"] > 0
    longer = kernel_distance.kernel_distance(3 * x, y)
    assert longer["polynomial"] == pytest.approx(distance["polynomial"], rel=1e-5)
    assert longer["gaussian"] == pytest.approx(distance["gaussian"], rel=1e-5)


def test_bad_features_are_refused():
    good = samples(0, 5)
    bad = good.copy()
    bad[3, 2] = np.nan
    with pytest.raises(UserError, match="1 of 5 feature rows"):
        kernel_distance.kernel_distance(bad, good)
    with pytest.raises(UserError, match="at least 2 rows"):
        kernel_distance.kernel_distance(good[:1], good)
    with pytest.raises(ValueError, match="5 and 4 dimensions cannot be compared"):
        kernel_distance.squared_mmd(good, good[:, :4], kernel_distance.gaussian_kernel)
