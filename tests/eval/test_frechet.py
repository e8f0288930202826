"""The Fréchet distance against its closed forms."""

import numpy as np
import pytest
import scipy.linalg

from rag_mm.core.errors import UserError
from rag_mm.eval import frechet


def draw(num, dim, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num, dim)) @ rng.standard_normal((dim, dim)) + rng.normal(size=dim)


@pytest.mark.parametrize(("num_x", "num_y"), [(40, 50), (4, 50)])
def test_it_is_that_of_the_matrix_square_root(num_x, num_y):
    """More rows than dimensions, and fewer, where a covariance is singular."""
    x, y = draw(num_x, 6, 0), draw(num_y, 6, 1)
    covariances = [np.cov(each, rowvar=False) for each in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(6)).real
    wanted = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet.frechet_distance(x, y) == pytest.approx(wanted, rel=1e-4)


def test_a_set_is_at_its_own_place_and_a_shift_adds_its_square():
    x = draw(30, 5, 2)
    assert frechet.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet.frechet_distance(x, x + 2) == pytest.approx(5 * 4)


@pytest.mark.parametrize("bad", [np.ones((1, 3)), np.full((4, 3), np.nan)])
def test_too_few_or_broken_rows_are_refused(bad):
    with pytest.raises(UserError, match="needs two finite feature rows"):
        frechet.frechet_distance(bad, np.ones((4, 3)))
