"""Attention for CPUs, where passes over the scores cost more than products.

A softmax takes off the largest score only to keep its exponentials finite. The largest product of norms
bounds every score (Cauchy-Schwarz) and is had without making any: where it is small, as in decoders trained
here, nothing is taken off, and XLA takes the exponential as it multiplies.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

# Self-attention is cut into at most this many runs of queries, each of at least this length.
MAX_CHUNKS, MIN_CHUNK = 2, 32
# Gradients are divided by sums of at most exp(20) times a row's length, which leaves 25 decades of float32.
MAX_BOUND = 20.0


def cpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
) -> jax.Array:
    """Causal attention of a run of positions to itself, within segments where their ids are given.

    A chunk of queries meets the keys up to its own end only: with two chunks a quarter of the scores is never
    made; more chunks save less than their programs take to compile.

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H], K dividing N.
        query_segment_ids, key_segment_ids: int32 [B, T], or None both.

    Returns:
        [B, T, N, H] in q's dtype; all arithmetic is float32.
    """
    dtype, length, groups = q.dtype, q.shape[1], q.shape[2] // k.shape[2]
    if groups > 1:
        layout = jax.typeof(q).sharding
        layout = None if layout.mesh.empty else layout.spec
        k, v = (jnp.repeat(x, groups, axis=2, out_sharding=layout) for x in (k, v))
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    num_chunks = max(1, min(MAX_CHUNKS, length // MIN_CHUNK))
    bounds = [length * i // num_chunks for i in range(num_chunks + 1)]
    chunks = []
    for start, end in itertools.pairwise(bounds):
        at = jnp.arange(end, dtype=jnp.int32)
        mask = (at[None, :] <= at[start:, None])[None, None]
        if query_segment_ids is not None and key_segment_ids is not None:
            mask &= (query_segment_ids[:, start:end, None] == key_segment_ids[:, None, :end])[
                :, None
            ]
        chunks.append(_attend(q[:, start:end], k[:, :end], v[:, :end], mask))
    return jnp.concatenate(chunks, axis=1).astype(dtype)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 [B, t, N, H] of scaled queries to [B, S, N, H]; each sees a key, by bool [B or 1, 1, t, S]."""
    return _forward(q, k, v, mask)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    """Also what the backward pass reads: unnormalised weights [B, N, t, S] and their sums [B, t, N, 1]."""
    norm = lambda x: jnp.sqrt(jnp.square(x).sum(-1).max())
    args = q, k, mask
    weights = jax.lax.cond(norm(q) * norm(k) <= MAX_BOUND, _weigh_unshifted, _weigh, *args)
    sums = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]
    attended = jnp.einsum("bnts,bsnh->btnh", weights, v) / sums
    return attended, (q, k, v, weights, sums, attended)


def _weigh_unshifted(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k)), 0.0)


def _weigh(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k), -jnp.inf)
    return jnp.exp(scores - scores.max(-1, keepdims=True))


def _backward(kept: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, sums, attended = kept
    grad = grad / sums
    own = jnp.moveaxis((grad * attended).sum(-1), 1, 2)[..., None]  # [B, N, t, 1]
    scores_grad = weights * (jnp.einsum("btnh,bsnh->bnts", grad, v) - own)
    return (
        jnp.einsum("bnts,bsnh->btnh", scores_grad, k),
        jnp.einsum("bnts,btnh->bsnh", scores_grad, q),
        jnp.einsum("bnts,btnh->bsnh", weights, grad),
        None,
    )


_attend.defvjp(_forward, _backward)
