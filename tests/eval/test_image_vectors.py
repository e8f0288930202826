"""Figures of images' codes, against values that follow from how the codes were made."""

import numpy as np
import pytest

from rag_mm.eval import image_vectors

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("count", [40, 2000])
def test_the_participation_ratio_counts_equal_directions(count):
    directions = np.linalg.qr(RNG.normal(size=(128, 3)))[0]
    # Exactly equal variances: orthonormal coordinates with mean zero.
    within = RNG.normal(size=(count, 3))
    within = np.linalg.qr(within - within.mean(0))[0]
    codes = (within @ directions.T).reshape(count, 4, 32) + 7
    assert image_vectors.participation_ratio(codes) == pytest.approx(3)
    one = (within[:, :1] @ directions[:, :1].T).reshape(count, 4, 32)
    assert image_vectors.participation_ratio(one) == pytest.approx(1)


def test_predicting_the_mean_explains_nothing_and_the_codes_everything():
    codes = RNG.normal(size=(50, 2, 8))
    between = image_vectors.variance(codes)
    mean = np.broadcast_to(codes.mean(0), codes.shape)
    assert image_vectors.explained(mean, codes, between).mean() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(image_vectors.explained(codes, codes, between), 1)


def test_the_nearest_candidate_is_found_by_distance():
    codes = np.array([[0.0, 0], [3, 0], [0, 5]])
    candidates = np.array([[1, 0, 2], [2, 1, 0], [2, 0, 1]])
    predicted = np.array([[0.1, 0], [0, 4.0], [2.9, 0.1]])
    order = image_vectors.nearest(predicted, codes, candidates)
    np.testing.assert_array_equal(order, [[0, 1, 2], [2, 0, 1], [1, 0, 2]])
    found = image_vectors.is_nearest(predicted, codes, candidates)
    np.testing.assert_array_equal(found, [False, True, False])


def test_a_linear_readout_recovers_pixels_that_are_linear_in_the_codes():
    codes = RNG.normal(size=(3000, 2, 3)) * 5
    weights = RNG.normal(size=(6, 12)) * 0.003  # Far from black and white.
    images = (255 * (codes.reshape(-1, 6) @ weights + 0.5)).round().astype(np.uint8)
    images = images.reshape(-1, 2, 2, 3)
    readout = image_vectors.LinearReadout.fit(codes[:2500], images[:2500])
    made = readout.images(codes[2500:], (2, 2, 3))
    assert np.abs(made.astype(int) - images[2500:]).max() <= 2
