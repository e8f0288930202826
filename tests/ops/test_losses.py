"""Losses against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_token_nll_is_finite_for_large_logits():
    logits = np.array([[[1e4, 0.0, -1e4]]], np.float32)
    for target, expected in enumerate([0.0, 1e4, 2e4]):
        assert losses.token_nll(logits, np.array([[target]], np.int32))[0, 0] == expected


def test_token_nll_gradient_is_probability_minus_one_hot():
    logits = np.random.default_rng(1).normal(size=(1, 1, 5)).astype(np.float32)
    grad = jax.grad(lambda x: losses.token_nll(x, np.array([[3]], np.int32)).sum())(logits)
    expected = np.exp(log_softmax(logits.astype(float)))
    expected[0, 0, 3] -= 1
    np.testing.assert_allclose(grad, expected, atol=1e-6)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 16])
def test_chunked_nll_has_the_value_and_the_gradient_of_the_whole(num_chunks):
    """Even if the number of chunks does not divide the number of positions, or exceeds it."""
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(2, 11, 8)).astype(np.float32)
    table = rng.normal(size=(23, 8)).astype(np.float32)
    targets = rng.integers(23, size=(2, 11)).astype(np.int32)
    weights = rng.normal(size=(2, 11)).astype(np.float32)

    def loss(hidden, table, num_chunks):
        logits_fn = lambda x: jnp.einsum("btd,vd->btv", x, table)
        nll = losses.chunked_token_nll(logits_fn, hidden, targets, num_chunks)
        return (nll * weights).sum(), nll

    compute = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    expected, found = compute(hidden, table, 1), compute(hidden, table, num_chunks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, found)


def test_chunked_logits_are_never_stored_whole():
    """Neither pass has an array of all logits."""
    hidden, table = jnp.ones((2, 64, 8)), jnp.ones((1000, 8))
    targets = jnp.zeros((2, 64), jnp.int32)

    def loss(hidden, table, num_chunks):
        logits_fn = lambda x: jnp.einsum("btd,vd->btv", x, table)
        return losses.chunked_token_nll(logits_fn, hidden, targets, num_chunks).sum()

    grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    whole, chunked = (grad.lower(hidden, table, n).compile() for n in (1, 8))
    assert "[2,64,1000]" in whole.as_text() and "[2,64,1000]" not in chunked.as_text()
    assert "[2,8,1000]" in chunked.as_text()
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (whole, chunked)]
    assert sizes[1] < sizes[0] / 3


def test_less_than_one_chunk_is_an_error():
    with pytest.raises(ValueError, match="num_chunks is 0"):
        losses.chunked_token_nll(lambda x: x, jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), 0)
