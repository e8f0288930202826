"""Attention behind one function: softmax(q k^T / sqrt(H)) v with causal, segment and cache masks.

Splash on a TPU and cuDNN on a GPU where their kernels fit, `cpu_attention` on a CPU, XLA elsewhere; one
reference for all.
"""

import jax
import jax.numpy as jnp

from rag_mm.core import sharding
from rag_mm.ops import cpu_attention, splash

IMPLEMENTATIONS = ("splash", "cudnn", "cpu", "xla")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    is_causal: bool,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    query_offset: jax.Array | int = 0,
    implementation: str | None = None,
) -> jax.Array:
    """Multi-head, grouped or multi-query attention.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H], K dividing N.
        is_causal: query t sees keys s <= t + query_offset.
        query_segment_ids, key_segment_ids: int32 [B, T] and [B, S]; a query sees keys of its own segment
            only. Give both or neither. Padding is a segment of its own.
        query_offset: index of the first query among the keys (a KV cache holds more keys than queries).
        implementation: splash | cudnn | cpu | xla, the reference; None lets `choose` decide.

    Returns:
        [B, T, N, H] in q's dtype; scores and softmax are float32.

    Raises:
        ValueError: only one of the segment ids was given; no such implementation, or one for causal
            attention of positions to themselves where it is not.
    """
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("give both query_segment_ids and key_segment_ids, or neither")
    starts_at_0 = isinstance(query_offset, int) and query_offset == 0
    is_self = is_causal and starts_at_0 and q.shape[1] == k.shape[1]
    kind = implementation or choose(sharding.platform(), q, k, is_self)
    if kind not in IMPLEMENTATIONS or (kind != "xla" and not is_self):
        raise ValueError(f"there is no implementation {kind!r} for this attention")
    if kind == "splash":
        return splash.splash_attention(q, k, v, query_segment_ids)
    if kind == "cpu":
        return cpu_attention.cpu_attention(q, k, v, query_segment_ids, key_segment_ids)
    backend = "cudnn" if kind == "cudnn" else "xla"
    return _attend(q, k, v, is_causal, query_segment_ids, key_segment_ids, query_offset, backend)


def choose(platform: str, q: jax.Array, k: jax.Array, is_self: bool) -> str:
    """splash | cudnn | cpu | xla for heads as in `attention`.

    `is_self`: causal, and no key is older than query 0.

    Splash reads whole blocks of 128 positions; cuDNN's fused kernels take 16-bit heads of at most 128
    whose length is a multiple of 8.
    """
    if platform == "tpu" and is_self and q.shape[1] % splash.LANES == 0:
        return "splash"
    is_narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[3] % 8 == 0 and q.shape[3] <= 128
    if platform in ("gpu", "cuda") and is_self and is_narrow and fits:
        return "cudnn"
    return "cpu" if platform == "cpu" and is_self else "xla"


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    is_causal: bool,
    query_segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    query_offset: jax.Array | int,
    backend: str = "xla",
) -> jax.Array:
    if backend == "cudnn" and query_segment_ids is None:
        # Without segments the kernel needs no stored mask.
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=backend)
    mask = None
    if is_causal:
        queries = jnp.arange(q.shape[1], dtype=jnp.int32) + query_offset
        mask = (jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] <= queries[:, None])[None, None]
    if query_segment_ids is not None and key_segment_ids is not None:
        same = (query_segment_ids[:, :, None] == key_segment_ids[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    with jax.numpy_dtype_promotion("standard"):  # It mixes bfloat16 heads with float32 scores.
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=backend)
    # Of a batch of one row XLA's path forgets over what it is split.
    layout = jax.typeof(q).sharding.spec
    is_kept = jax.typeof(attended).sharding.spec == layout
    return attended if is_kept else jax.sharding.reshard(attended, layout)
