"""Causal self-attention for CPUs, where passes over the scores cost more than matrix products.

A softmax subtracts the largest score only to keep its exponentials finite. The product of the largest query
norm and the largest key norm bounds every score (Cauchy-Schwarz) and is cheap. Where this bound is small, as
in the decoders trained here, nothing is subtracted, and XLA fuses the exponential with the product.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Queries are split into at most MAX_CHUNKS chunks of at least MIN_CHUNK positions.
MAX_CHUNKS, MIN_CHUNK = 2, 32
# Gradients are divided by sums of at most exp(20) times the sequence length: 25 decades of float32 remain.
MAX_BOUND = 20.0


def cpu_attention(
    q: Float[Array | np.ndarray, "B T N H"],
    k: Float[Array | np.ndarray, "B T K H"],
    v: Float[Array | np.ndarray, "B T K H"],
    query_segment_ids: Int[Array | np.ndarray, "B T"] | None,
    key_segment_ids: Int[Array | np.ndarray, "B T"] | None,
) -> Float[Array, "B T N H"]:
    """Causal self-attention, within segments if their ids are given; all arithmetic is float32.

    Each chunk of queries is multiplied only by the keys up to the chunk's end. Two chunks save a quarter of
    the scores; more chunks would save less than they cost in compile time.

    Args:
        q: queries.
        k, v: keys and values; K divides N.
        query_segment_ids, key_segment_ids: both or neither.

    Returns:
        The attended values in q's dtype.
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
def _attend(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    mask: Bool[Array, "#B 1 t S"],
) -> Float[Array, "B t N H"]:
    """Attention of one chunk of t scaled queries; every query must see at least one key."""
    return _forward(q, k, v, mask)[0]


def _forward(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    mask: Bool[Array, "#B 1 t S"],
) -> tuple[Float[Array, "B t N H"], Any]:
    """`_attend` and its residuals, among them the unnormalized weights [B, N, t, S] and their sums."""
    norm = lambda x: jnp.sqrt(jnp.square(x).sum(-1).max())
    args = q, k, mask
    weights = jax.lax.cond(norm(q) * norm(k) <= MAX_BOUND, _weigh_unshifted, _weigh, *args)
    sums = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]
    attended = jnp.einsum("bnts,bsnh->btnh", weights, v) / sums
    return attended, (q, k, v, weights, sums, attended)


def _weigh_unshifted(
    q: Float[Array, "B t N H"], k: Float[Array, "B S N H"], mask: Bool[Array, "#B 1 t S"]
) -> Float[Array, "B N t S"]:
    return jnp.where(mask, jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k)), 0.0)


def _weigh(
    q: Float[Array, "B t N H"], k: Float[Array, "B S N H"], mask: Bool[Array, "#B 1 t S"]
) -> Float[Array, "B N t S"]:
    scores = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k), -jnp.inf)
    return jnp.exp(scores - scores.max(-1, keepdims=True))


def _backward(
    residuals: Any, grad: Float[Array, "B t N H"]
) -> tuple[Float[Array, "B t N H"], Float[Array, "B S N H"], Float[Array, "B S N H"], None]:
    q, k, v, weights, sums, attended = residuals
    grad = grad / sums
    mean = jnp.moveaxis((grad * attended).sum(-1), 1, 2)[..., None]  # [B, N, t, 1]
    scores_grad = weights * (jnp.einsum("btnh,bsnh->bnts", grad, v) - mean)
    return (
        jnp.einsum("bnts,bsnh->btnh", scores_grad, k),
        jnp.einsum("bnts,btnh->bsnh", scores_grad, q),
        jnp.einsum("bnts,btnh->bsnh", weights, grad),
        None,
    )


_attend.defvjp(_forward, _backward)
