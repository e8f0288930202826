"""Losses against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.ops import losses


def log_softmax(x, axis=-1):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def test_token_nll_is_minus_the_log_probability_of_the_target():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 11)) * 5
    targets = rng.integers(11, size=(2, 3)).astype(np.int32)
    expected = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    found = jax.jit(losses.token_nll)(logits.astype(np.float32), targets)
    assert (found.shape, found.dtype) == ((2, 3), jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_token_nll_survives_logits_that_would_overflow():
    logits = np.array([[[1e4, 0.0, -1e4]]], np.float32)
    for target, expected in enumerate([0.0, 1e4, 2e4]):
        assert losses.token_nll(logits, np.array([[target]], np.int32))[0, 0] == expected


def test_token_nll_gradient_is_probability_minus_one_hot():
    logits = np.random.default_rng(1).normal(size=(1, 1, 5)).astype(np.float32)
    grad = jax.grad(lambda x: losses.token_nll(x, np.array([[3]], np.int32)).sum())(logits)
    expected = np.exp(log_softmax(logits.astype(float)))
    expected[0, 0, 3] -= 1
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_info_nce_is_the_mean_of_both_directions():
    similarities = np.random.default_rng(2).normal(size=(4, 4)) * 3
    rows, columns = log_softmax(similarities, 1), log_softmax(similarities, 0)
    found, hits = jax.jit(losses.info_nce)(similarities.astype(np.float32))
    np.testing.assert_allclose(found, -(np.diag(rows) + np.diag(columns)) / 2, atol=1e-5)
    np.testing.assert_array_equal(hits, similarities.argmax(1) == np.arange(4))


def test_info_nce_of_matched_pairs_is_zero_and_of_chance_log_batch():
    found, hits = losses.info_nce(100 * np.eye(8, dtype=np.float32))
    np.testing.assert_allclose(found, 0, atol=1e-6)
    assert hits.all()
    chance, _ = losses.info_nce(np.zeros((8, 8), np.float32))
    np.testing.assert_allclose(chance, np.log(8), rtol=1e-6)
