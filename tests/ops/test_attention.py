"""What attention sees: causal, segment and cache masks, grouped heads, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rag_mm.core import sharding
from rag_mm.ops import attention

B, T, S, N, H = 2, 5, 7, 4, 6


@functools.partial(jax.jit, static_argnames="is_causal")
def attend(q, k, v, is_causal, query_segment_ids=None, key_segment_ids=None, query_offset=0):
    return attention.attention(
        q,
        k,
        v,
        is_causal=is_causal,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_offset=query_offset,
    )


def naive(q, k, v, sees):
    """One query and one head at a time; `sees(b, t, s)` says which keys are visible."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        visible = [s for s in range(k.shape[1]) if sees(b, t, s)]
        scores = k[b, visible, n // group].astype(float) @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, visible, n // group]
    return out


def make_heads(num_kv_heads=N, length=S):
    rng = np.random.default_rng(num_kv_heads)
    q = rng.normal(size=(B, T, N, H)).astype(np.float32)
    k, v = rng.normal(size=(2, B, length, num_kv_heads, H)).astype(np.float32)
    return q, k, v


@pytest.mark.parametrize("num_kv_heads", [N, 2, 1], ids=["multi-head", "grouped", "multi-query"])
def test_every_head_reads_the_keys_of_its_group(num_kv_heads):
    q, k, v = make_heads(num_kv_heads)
    expected = naive(q, k, v, lambda b, t, s: True)
    np.testing.assert_allclose(attend(q, k, v, False), expected, atol=1e-5)


def test_causal_means_no_later_key():
    q, k, v = make_heads(2, T)
    expected = naive(q, k, v, lambda b, t, s: s <= t)
    np.testing.assert_allclose(attend(q, k, v, True), expected, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 2])
def test_the_offset_is_the_place_of_the_first_query_among_the_keys(offset):
    q, k, v = make_heads()
    expected = naive(q, k, v, lambda b, t, s: s <= t + offset)
    found = attend(q, k, v, True, query_offset=jnp.int32(offset))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # What lies beyond the last visible key, such as an unwritten cache, changes nothing.
    k[:, T + offset :], v[:, T + offset :] = 1e4, -1e4
    np.testing.assert_array_equal(attend(q, k, v, True, query_offset=jnp.int32(offset)), found)


@pytest.mark.parametrize("is_causal", [False, True])
def test_segments_do_not_see_each_other(is_causal):
    q, k, v = make_heads(2, T)
    segments = np.array([[1, 1, 2, 2, 0], [0, 0, 3, 3, 3]], np.int32)
    expected = naive(
        q,
        k,
        v,
        lambda b, t, s: segments[b, t] == segments[b, s] and (s <= t or not is_causal),
    )
    found = attend(q, k, v, is_causal, segments, segments)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_long_rows_are_cut_into_runs_of_queries_unseen():
    """In value, in gradient, and split over batch and heads of eight devices."""
    length = 4 * attention.MIN_CHUNK + 3  # not a multiple of the number of runs
    rng = np.random.default_rng(length)
    q = rng.normal(size=(4, length, 2, H)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, length, 2, H)).astype(np.float32)
    segments = np.sort(rng.integers(3, size=(4, length))).astype(np.int32)

    def whole(q, k, v):
        """Without a causal mask nothing is cut, so causality is put into the segments' mask here."""
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(jnp.float32(H))
        same = segments[:, :, None] == segments[:, None]
        mask = (same & np.tri(length, dtype=bool))[:, None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    def cut(q, k, v):
        return attend(q, k, v, True, segments, segments)

    np.testing.assert_allclose(cut(q, k, v), whole(q, k, v), atol=1e-5)
    loss = lambda function: lambda *heads: jnp.square(function(*heads)).sum()
    found, expected = (jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, k, v) for f in (cut, whole))
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)

    mesh = sharding.make_mesh(2, 2, 2)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        spread = cut(*jax.device_put((q, k, v), place))
    assert spread.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor", None)
    np.testing.assert_allclose(spread, whole(q, k, v), atol=1e-5)


def test_segment_ids_come_in_pairs():
    q, k, v = make_heads(2, T)
    segments = np.ones((B, T), np.int32)
    for given in ({"query_segment_ids": segments}, {"key_segment_ids": segments}):
        with pytest.raises(ValueError, match="both"):
            attention.attention(q, k, v, is_causal=True, **given)


def test_softmax_is_float32_for_bfloat16_heads():
    q, k, v = (x.astype(jnp.bfloat16) for x in make_heads(2))
    found = attend(q, k, v, False)
    assert found.dtype == jnp.bfloat16
    expected = naive(*(np.asarray(x, np.float32) for x in (q, k, v)), lambda b, t, s: True)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2)
