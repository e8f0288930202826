"""Positions: rotation by pairs, and sinusoids, against their formulas."""

import jax
import numpy as np
import pytest

from rag_mm.ops import rope

POSITIONS = np.array([[0, 1, 5, 700], [3, 4, 8, 703]], np.int32)


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
def test_each_pair_is_rotated_by_its_angle(theta):
    """Pair (i, i + H/2) as a complex number is multiplied by exp(i position / theta^(2i/H))."""
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 8)).astype(np.float32)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angles = POSITIONS[:, :, None, None] / theta ** (2 * np.arange(4) / 8)
    rotated = pairs * np.exp(1j * angles)
    expected = np.concatenate([rotated.real, rotated.imag], -1)
    rotate = lambda x, positions: rope.rotate(x, rope.make_rotation(positions, 8, theta))
    found = jax.jit(rotate)(x, POSITIONS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_scores_depend_only_on_distance():
    """Two pairs of positions at the same distance give the same score."""
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(query_position, key_position):
        at = lambda position: rope.make_rotation(np.array([[position]], np.int32), 16)
        left, right = rope.rotate(q, at(query_position)), rope.rotate(k, at(key_position))
        return float((left * right).sum())

    assert score(90, 0) == pytest.approx(score(510, 420), abs=1e-4)
    assert score(90, 0) != pytest.approx(score(91, 0), abs=1e-3)


def test_position_zero_changes_nothing_and_dtype_is_kept():
    x = jax.numpy.ones((1, 2, 1, 4), jax.numpy.bfloat16)
    found = rope.rotate(x, rope.make_rotation(np.zeros((1, 2), np.int32), 4))
    assert found.dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(found, x)


def test_sinusoids_are_sines_then_cosines_of_geometric_wavelengths():
    found = rope.sinusoids(POSITIONS, 6)
    frequencies = 10_000.0 ** (-np.array([0, 1, 2]) / 2)  # from 1 to 1 / 10,000, both included
    angles = POSITIONS[..., None] * frequencies
    assert (found.shape, found.dtype) == ((2, 4, 6), np.float32)
    np.testing.assert_allclose(
        found, np.concatenate([np.sin(angles), np.cos(angles)], -1), atol=1e-4
    )
    # The smallest width has one wavelength.
    np.testing.assert_allclose(
        rope.sinusoids(POSITIONS, 2)[..., 0], np.sin(POSITIONS.astype(float)), atol=1e-4
    )
