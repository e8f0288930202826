"""Attention behind one function: softmax(q k^T / sqrt(H)) v with causal, segment and cache masks."""

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    is_causal: bool,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
) -> jax.Array:
    """Multi-head, grouped or multi-query attention.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H], K dividing N.
        is_causal: query t sees keys s <= t + query_offset.
        query_segment_ids, key_segment_ids: int32 [B, T] and [B, S]; a query sees keys of its own segment
            only. Give both or neither. Padding is a segment of its own.
        query_offset: index of the first query among the keys (a KV cache holds more keys than queries).

    Returns:
        [B, T, N, H] in q's dtype; scores and softmax are float32.

    Raises:
        ValueError: only one of the segment ids was given.
    """
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("give both query_segment_ids and key_segment_ids, or neither")
    mask = None
    if is_causal:
        queries = jnp.arange(q.shape[1], dtype=jnp.int32) + query_offset
        mask = (jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] <= queries[:, None])[None, None]
    if query_segment_ids is not None and key_segment_ids is not None:
        same = (query_segment_ids[:, :, None] == key_segment_ids[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    with jax.numpy_dtype_promotion("standard"):  # It mixes bfloat16 heads with float32 scores.
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
