"""SPAE's semantic guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_mm.models.spae import semantic
from rag_mm.ops import quantize

GRIDS = ((1, 1), (2, 2))


def _codebook(count=8, dim=3):
    return jax.random.normal(jax.random.key(0), (count, dim))


def test_relative_scores_are_1_for_the_best_word_and_0_for_unknown_ones():
    features = np.array([[1.0, 0], [0, 1], [-1, 0], [0, 0]])
    scores = semantic.relative_scores(np.array([[0.6, 0.8], [-1, 0]]), features)
    np.testing.assert_allclose(scores, [[1.2 / 1.4, 1, 0, 0], [0, 0.5, 1, 0]])


def test_words_without_features_do_not_count_for_the_others():
    features = np.array([[-1.0, 0], [-0.5, 0], [0, 0]])
    scores = semantic.relative_scores(np.array([[1.0, 0], [-1, 0]]), features)
    np.testing.assert_allclose(scores, [[0, 1, 0], [1, 0, 0]])
    assert not semantic.relative_scores(np.ones((2, 2)), np.zeros((3, 2))).any()


def _loss(z, words, sizes, codes=None, scale=1.0):
    codebook = _codebook()
    if codes is None:
        codes = quantize.quantize(z, codebook, GRIDS)
    targets = quantize.level_targets(z, codes, codebook, GRIDS)
    return semantic.semantic_loss(targets, codebook, words, sizes, jax.random.key(1), scale)


def test_the_loss_is_the_negative_log_softmax_of_scaled_distances():
    z, codebook = jax.random.normal(jax.random.key(2), (1, 2, 2, 3)), _codebook()
    ours = _loss(z, jnp.array([[5]]), jnp.array([[1]]))
    # P(1) of a 2 x 2 grid is its last position.
    distances = ((z[0, 1, 1][None] - codebook) ** 2).sum(axis=1) / (2 * jnp.mean(codebook**2))
    theirs = -jax.nn.log_softmax(-distances)[5]
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_many_words_are_compared_in_chunks_to_the_same_loss(monkeypatch):
    z, pools = jax.random.normal(jax.random.key(5), (2, 2, 2, 3)), ([[1, 6], [7, 2]], [[2], [1]])
    both = jax.value_and_grad(lambda z: _loss(z, *map(jnp.array, pools)))
    whole = both(z)
    monkeypatch.setattr(semantic, "_MAX_LOGITS", 6)  # 2 points: chunks of 3 of the 8 words.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), both(z), whole
    )


def test_no_matrix_of_points_and_words_outgrows_the_limit():
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((256, 16, 16), "f4"), ((65_536, 16), "f4"))]
    words = jax.ShapeDtypeStruct((256, 16), "i4")

    def loss(z, codebook, words):
        factor = jnp.float32(1)
        return jnp.sum(semantic._negative_log_softmax(z, words, codebook, factor))

    compiled = jax.jit(jax.grad(loss)).lower(*shapes, words).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * semantic._MAX_LOGITS


def test_descending_the_loss_makes_every_guided_code_a_word_of_its_pool():
    z = jax.random.normal(jax.random.key(3), (2, 2, 2, 3))
    words, sizes = jnp.array([[2, 7], [4, 4]]), jnp.array([[2], [1]])
    step = jax.jit(jax.grad(lambda z: _loss(z, words, sizes, scale=4.0)))
    for _ in range(200):
        z = z - 0.3 * step(z)
    codes = np.asarray(quantize.quantize(z, _codebook(), GRIDS))
    assert codes[0, 0] in (2, 7) and codes[1, 0] == 4


def test_words_are_drawn_from_the_first_of_the_pool_only():
    z = jnp.zeros((1, 2, 2, 3))
    one = _loss(z, jnp.array([[1, 6]]), jnp.array([[1]]))
    same = _loss(z, jnp.array([[1, 3]]), jnp.array([[1]]))
    assert float(one) == float(same)


def test_earlier_words_and_the_codebook_have_no_gradient():
    z, codebook = jax.random.normal(jax.random.key(4), (1, 2, 2, 3)), _codebook()
    codes = quantize.quantize(z, codebook, GRIDS)

    def loss(codebook):
        targets = quantize.level_targets(z, codes, codebook, GRIDS)
        pools = (jnp.array([[0]]), jnp.array([[1, 1]]))
        return semantic.semantic_loss(targets, codebook, *pools, jax.random.key(0), 1.0)

    assert not jax.grad(loss)(codebook).any()


def test_balance_has_no_gradient_and_is_bounded():
    assert float(semantic.balance(jnp.float32(6), jnp.float32(2))) == 3
    assert float(semantic.balance(jnp.float32(6), jnp.float32(0))) == 1000
    assert jax.grad(lambda x: semantic.balance(x, jnp.float32(2)) * 1.0)(jnp.float32(6)) == 0


@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"logit_scale": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError):
        semantic.SemanticConfig(**wrong)
