"""Attention against plain loops: causal, segment and cache masks, grouped heads, every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rag_mm.core import sharding
from rag_mm.ops import attention, cpu_attention, splash

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
    """One query and one head at a time; `sees(b, t, s)` tells whether query t sees key s."""
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


def test_causal_attention_sees_no_later_key():
    q, k, v = make_heads(2, T)
    expected = naive(q, k, v, lambda b, t, s: s <= t)
    np.testing.assert_allclose(attend(q, k, v, True), expected, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 2])
def test_the_offset_is_the_index_of_the_first_query_among_the_keys(offset):
    q, k, v = make_heads()
    expected = naive(q, k, v, lambda b, t, s: s <= t + offset)
    found = attend(q, k, v, True, query_offset=jnp.int32(offset))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Keys after the last visible one, such as unwritten cache entries, change nothing.
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


@pytest.mark.parametrize("num_kv_heads", [2, 1], ids=["multi-head", "multi-query"])
@pytest.mark.parametrize("size", [1.0, 10.0], ids=["small norms", "large norms"])
def test_long_sequences_in_chunks_of_queries_equal_full_attention(size, num_kv_heads):
    """In value, in gradient, and with batch and heads sharded over eight devices.

    With large norms the exponentials of scores overflow float32, and scores of some hundreds are themselves
    rounded to 3e-5, so that weights and gradients differ by a few times that part of themselves.
    """
    length = 4 * cpu_attention.MIN_CHUNK + 3  # not a multiple of the number of chunks
    rng = np.random.default_rng(length)
    q = rng.normal(size=(4, length, 2, H)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, length, num_kv_heads, H)).astype(np.float32)
    q, k = size * q, size * k
    segments = np.sort(rng.integers(3, size=(4, length))).astype(np.int32)

    def whole(q, k, v):
        """All scores at once, with one mask for causality and segments."""
        k, v = (jnp.repeat(x, 2 // num_kv_heads, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(jnp.float32(H))
        same = segments[:, :, None] == segments[:, None]
        mask = (same & np.tri(length, dtype=bool))[:, None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    def chunked(q, k, v):
        return attend(q, k, v, True, segments, segments)

    np.testing.assert_allclose(chunked(q, k, v), whole(q, k, v), atol=1e-5 * size)
    loss = lambda function: lambda *heads: jnp.square(function(*heads)).sum()
    found, expected = (jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, k, v) for f in (chunked, whole))
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4 * size)

    mesh = sharding.make_mesh(2, 2, 2)
    batch = ("data", "fsdp")
    split, replicated = (PartitionSpec(batch, None, axis) for axis in ("tensor", None))
    layouts = [split, *2 * [split if num_kv_heads == 2 else replicated]]
    placed = [
        jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip((q, k, v), layouts, strict=True)
    ]
    with jax.set_mesh(mesh):
        sharded = chunked(*placed)
        sharded_grads = jax.jit(jax.grad(loss(chunked), (0, 1, 2)))(*placed)
    assert sharded.sharding.spec == PartitionSpec(batch, None, "tensor", None)
    np.testing.assert_allclose(sharded, whole(q, k, v), atol=1e-5 * size)
    for left, right in zip(sharded_grads, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4 * size)


def test_small_gradients_do_not_underflow_if_no_maximum_is_subtracted():
    """Just below the bound, with upstream gradients as small as those of a mean over many tokens."""
    rng = np.random.default_rng(0)
    q, k, v, grad = rng.normal(size=(4, 2, 64, 2, 16)).astype(np.float32)
    norms = [np.sqrt(np.square(x).sum(-1).max()) for x in (q, k)]
    q *= 0.99 * cpu_attention.MAX_BOUND * 4 / (norms[0] * norms[1])
    compute_grads = lambda implementation: jax.jit(
        lambda *heads: jax.vjp(
            lambda *h: attention.attention(*h, is_causal=True, implementation=implementation),
            *heads,
        )[1](1e-12 * grad)
    )
    both = (compute_grads(name)(q, k, v) for name in ("cpu", "xla"))
    for found, expected in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_an_implementation_is_one_of_the_four():
    q, k, v = make_heads(2, T)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        attention.attention(q, k, v, is_causal=True, implementation="fast")
    with pytest.raises(ValueError, match="no implementation 'cpu'"):
        attention.attention(q, k, v, is_causal=False, implementation="cpu")


def test_segment_ids_come_in_pairs():
    q, k, v = make_heads(2, T)
    segments = np.ones((B, T), np.int32)
    for ids in ({"query_segment_ids": segments}, {"key_segment_ids": segments}):
        with pytest.raises(ValueError, match="both"):
            attention.attention(q, k, v, is_causal=True, **ids)


def test_float16_heads_are_attended_to_on_every_platform():
    """Alone among the dtypes it has no product with a float32 sum on a CPU; here with a mask and a cache."""
    q, k, v = (x.astype(jnp.float16) for x in make_heads(2))
    found = attention.attention(q[:, -1:], k, v, is_causal=True, query_offset=q.shape[1] - 1)
    assert found.dtype == jnp.float16
    wide = [x.astype(jnp.float32) for x in (q[:, -1:], k, v)]
    expected = attention.attention(*wide, is_causal=True, query_offset=q.shape[1] - 1)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_softmax_is_float32_for_bfloat16_heads():
    q, k, v = (x.astype(jnp.bfloat16) for x in make_heads(2))
    found = attend(q, k, v, False)
    assert found.dtype == jnp.bfloat16
    expected = naive(*(np.asarray(x, np.float32) for x in (q, k, v)), lambda b, t, s: True)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2)


def make_long_heads(num_kv_heads, length=256):
    rng = np.random.default_rng(num_kv_heads)
    q = rng.normal(size=(4, length, N, 16)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, length, num_kv_heads, 16)).astype(np.float32)
    segments = np.sort(rng.integers(3, size=(4, length)), axis=1).astype(np.int32)
    return (q, k, v), segments


@pytest.mark.parametrize("num_kv_heads", [N, 2], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=["no mesh", "2x2x2"])
def test_splash_equals_the_reference_in_value_and_gradient(num_kv_heads, shape):
    """The TPU kernel, interpreted, with packed segments."""
    heads, segments = make_long_heads(num_kv_heads)

    def reference(q, k, v, segments):
        ids = dict(query_segment_ids=segments, key_segment_ids=segments)
        return attention.attention(q, k, v, is_causal=True, **ids, implementation="xla")

    run = functools.partial(splash.splash_attention, is_interpreted=True)

    def both(function, *operands):
        loss = lambda *heads: jnp.square(function(*heads, operands[3])).sum()
        return jax.jit(
            lambda *heads: (function(*heads, operands[3]), jax.grad(loss, (0, 1, 2))(*heads))
        )(*operands[:3])

    expected = both(reference, *heads, segments)
    if shape is None:
        found = both(run, *heads, segments)
    else:
        mesh = sharding.make_mesh(*shape)
        place = lambda x, *axes: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), *axes))
        )
        sharded = [place(x, None, "tensor") for x in heads]
        with jax.set_mesh(mesh):
            found = both(run, *sharded, place(segments))
        assert found[0].sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor", None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), found, expected)


def test_splash_without_segments_is_causal():
    heads, _ = make_long_heads(N, 128)
    found = splash.splash_attention(*heads, None, is_interpreted=True)
    expected = attention.attention(*heads, is_causal=True, implementation="xla")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "head_dim", "is_self", "chosen"),
    [
        ("tpu", "bfloat16", 4096, 128, True, "splash"),
        ("tpu", "float32", 256, 96, True, "splash"),
        ("tpu", "bfloat16", 152, 128, True, "xla"),  # not whole blocks
        ("tpu", "bfloat16", 1, 128, False, "xla"),  # decoding
        ("gpu", "bfloat16", 4096, 128, True, "cudnn"),
        ("cuda", "float16", 152, 64, True, "cudnn"),
        ("gpu", "float32", 4096, 128, True, "xla"),
        ("gpu", "bfloat16", 4096, 256, True, "xla"),
        ("gpu", "bfloat16", 1, 128, False, "xla"),
        ("cpu", "bfloat16", 4096, 128, True, "cpu"),
        ("cpu", "float32", 1, 128, False, "xla"),
    ],
)
def test_the_kernel_follows_from_the_platform_and_the_shapes(
    platform, dtype, length, head_dim, is_self, chosen
):
    heads = jax.ShapeDtypeStruct((2, length, 4, head_dim), jnp.dtype(dtype))
    assert attention.choose(platform, heads, heads, is_self) == chosen


def test_the_chosen_implementation_runs(monkeypatch):
    """The platform is that of the context mesh, and masks are passed to the kernel."""
    seen = []
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "splash_attention", lambda q, k, v, ids: seen.append(ids) or q)
    heads, segments = make_long_heads(2)
    q, k, v = map(jnp.asarray, heads)
    ids = dict(query_segment_ids=segments, key_segment_ids=segments)
    attention.attention(q, k, v, is_causal=True, **ids)
    assert len(seen) == 1 and seen[0] is segments

    calls = []
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, k, v, **kwargs: calls.append(kwargs) or q
    )
    narrow = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    attention.attention(*narrow, is_causal=True, **ids)
    attention.attention(*narrow, is_causal=True)
    assert [call["implementation"] for call in calls] == ["cudnn", "cudnn"]
    at = np.arange(256)
    visible = (segments[:, :, None] == segments[:, None]) & (at[None, None] <= at[None, :, None])
    np.testing.assert_array_equal(calls[0]["mask"][:, 0], visible)
    assert calls[1]["is_causal"] and "mask" not in calls[1]
