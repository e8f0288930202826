"""Symmetric InfoNCE: by hand, in chunks, and on eight devices without the similarities of all pairs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_mm.core import sharding
from rag_mm.ops import contrastive

B, D = 40, 12  # No parameter or batch of 40 x 40 exists beside the similarities.
RNG = np.random.default_rng(0)
LEFT, RIGHT = (RNG.normal(size=(B, D)).astype(np.float32) for _ in range(2))
CLASSES = RNG.integers(-1, 9, B).astype(np.int32)
WEIGHTS = np.linspace(0.1, 1, B).astype(np.float32)
SCALE = np.array(2.0, np.float32)


def plain(left, right, scale, class_ids):
    """From the whole matrix of similarities."""
    similarities = scale * left @ right.T
    if class_ids is not None:
        is_same = (class_ids[:, None] == class_ids[None]) & (class_ids >= 0)[:, None]
        similarities = jnp.where(is_same & ~np.eye(B, dtype=bool), -jnp.inf, similarities)
    rows, columns = (jax.nn.log_softmax(similarities, axis) for axis in (1, 0))
    is_best = similarities.argmax(1) == jnp.arange(B)
    return -(jnp.diagonal(rows) + jnp.diagonal(columns)) / 2, is_best


def weighted(loss, class_ids):
    """The compiled gradient, by both embeddings and the scale, of a weighted sum over pairs, with hits."""

    def total(left, right, scale):
        nll, hits = loss(left, right, scale, class_ids)
        return (WEIGHTS * nll).sum(), hits

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def expected(has_classes):
    return weighted(plain, CLASSES if has_classes else None)(LEFT, RIGHT, SCALE)


def assert_equal(found, has_classes):
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, found, expected(has_classes))


@pytest.mark.parametrize("num_chunks", [1, 3, 64])
@pytest.mark.parametrize("has_classes", [False, True])
def test_chunks_give_loss_hits_and_gradients_of_the_whole_matrix(num_chunks, has_classes):
    """Even if the number of chunks does not divide the number of pairs, or exceeds it."""
    chunked = functools.partial(contrastive.info_nce, num_chunks=num_chunks)
    step = weighted(chunked, CLASSES if has_classes else None)
    assert_equal(step(LEFT, RIGHT, SCALE), has_classes)


@pytest.mark.parametrize(
    ("shape", "num_chunks", "has_classes", "rows"),
    [((8, 1, 1), 1, False, 5), ((4, 2, 1), 2, True, 3), ((2, 2, 2), 5, True, 2)],
)
def test_no_device_holds_the_similarities_of_all_pairs(shape, num_chunks, has_classes, rows):
    """In the compiled program of eight devices each has those of its own pairs, or of a chunk of them."""
    mesh = sharding.make_mesh(*shape)
    chunked = functools.partial(contrastive.info_nce, num_chunks=num_chunks)
    step = weighted(chunked, CLASSES if has_classes else None)
    with jax.set_mesh(mesh):
        placed = sharding.put_batch({"left": LEFT, "right": RIGHT}, mesh)
        program = step.lower(placed["left"], placed["right"], SCALE).compile()
        found = program(placed["left"], placed["right"], SCALE)
    assert_equal(found, has_classes)
    assert found[1][0].sharding.shard_shape((B, D)) == (B // (shape[0] * shape[1]), D)
    text = program.as_text()
    sizes = {int(rows) for rows in re.findall(r"f32\[(?:1,)?(\d+),40\]", text)}
    assert max(sizes) == rows and f"f32[{B},{B}]" not in text


def test_the_whole_matrix_would_be_found():
    """What the test above looks for is in the plain loss's program."""
    text = weighted(plain, None).lower(LEFT, RIGHT, SCALE).compile().as_text()
    assert f"f32[{B},{B}]" in text


def test_it_is_zero_for_matched_pairs_and_log_batch_for_equal_similarities():
    eye = np.eye(8, dtype=np.float32)
    found, hits = contrastive.info_nce(eye, eye, np.array(100, np.float32))
    np.testing.assert_allclose(found, 0, atol=1e-6)
    assert hits.all()
    equal, hits = contrastive.info_nce(eye, eye, np.array(0, np.float32))
    np.testing.assert_allclose(equal, np.log(8), rtol=1e-6)
    assert not hits.any()


def test_fewer_than_one_chunk_is_refused():
    with pytest.raises(ValueError, match="num_chunks is 0"):
        contrastive.info_nce(LEFT, RIGHT, SCALE, num_chunks=0)
