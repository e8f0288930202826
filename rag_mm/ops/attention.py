"""Attention behind one function: softmax(q k^T / sqrt(H)) v with causal, segment and cache masks.

Splash runs on a TPU and cuDNN on a GPU where their kernels fit, `cpu_attention` on a CPU, and XLA everywhere
else. XLA's is the reference for all.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rag_mm.core import sharding
from rag_mm.ops import cpu_attention, splash

IMPLEMENTATIONS = ("splash", "cudnn", "cpu", "xla")


def attention(
    q: Float[Array | np.ndarray, "B T N H"],
    k: Float[Array | np.ndarray, "B S K H"],
    v: Float[Array | np.ndarray, "B S K H"],
    *,
    is_causal: bool,
    query_segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    key_segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
    query_offset: Int[Array, ""] | int = 0,
    mask: Bool[Array | np.ndarray, "B T S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Multi-head, grouped or multi-query attention; scores and softmax are float32.

    Args:
        q: queries.
        k, v: keys and values; K divides N.
        is_causal: query t sees keys s <= t + query_offset.
        query_segment_ids, key_segment_ids: a query sees only keys of its own segment. Give both or neither.
            Padding is a segment of its own.
        query_offset: index of the first query among the keys (a KV cache holds more keys than queries).
        mask: which keys a query sees, of those that it would see without a mask.
        implementation: splash | cudnn | cpu | xla (the reference); None lets `choose` decide.

    Returns:
        The attended values in q's dtype.

    Raises:
        ValueError: only one of the segment ids was given, or `implementation` is unknown or cannot compute
            this attention: all but xla need causal attention with as many keys as queries and no offset.
    """
    if (query_segment_ids is None) != (key_segment_ids is None):
        raise ValueError("give both query_segment_ids and key_segment_ids, or neither")
    starts_at_0 = isinstance(query_offset, int) and query_offset == 0
    is_self = is_causal and starts_at_0 and q.shape[1] == k.shape[1] and mask is None
    chosen = implementation or choose(sharding.platform(), q, k, is_self)
    if chosen not in IMPLEMENTATIONS or (chosen != "xla" and not is_self):
        raise ValueError(
            f"there is no implementation {chosen!r} of this attention: choose from "
            f"{', '.join(IMPLEMENTATIONS)}; all but xla need causal self-attention without a cache or mask"
        )
    with jax.named_scope("attention"):
        if chosen == "splash":
            return splash.splash_attention(q, k, v, query_segment_ids)
        if chosen == "cpu":
            return cpu_attention.cpu_attention(q, k, v, query_segment_ids, key_segment_ids)
        backend = "cudnn" if chosen == "cudnn" else "xla"
        return _attend(
            q, k, v, is_causal, query_segment_ids, key_segment_ids, query_offset, mask, backend
        )


def choose(
    platform: str,
    q: Float[Array | np.ndarray | jax.ShapeDtypeStruct, "B T N H"],
    k: Float[Array | np.ndarray | jax.ShapeDtypeStruct, "B S K H"],
    is_self: bool,
) -> str:
    """The fastest implementation for these heads: splash | cudnn | cpu | xla.

    Splash reads whole blocks of 128 positions. cuDNN's fused kernels need 16-bit heads whose size is a
    multiple of 8 and at most 128.

    Args:
        platform: tpu | gpu | cuda | cpu.
        q, k: queries and keys, of which only shape and dtype matter.
        is_self: the attention is causal, and no key precedes query 0.
    """
    if platform == "tpu" and is_self and q.shape[1] % splash.LANES == 0:
        return "splash"
    is_narrow = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[3] % 8 == 0 and q.shape[3] <= 128
    if platform in ("gpu", "cuda") and is_self and is_narrow and fits:
        return "cudnn"
    return "cpu" if platform == "cpu" and is_self else "xla"


def _attend(
    q: Float[Array | np.ndarray, "B T N H"],
    k: Float[Array | np.ndarray, "B S K H"],
    v: Float[Array | np.ndarray, "B S K H"],
    is_causal: bool,
    query_segment_ids: Int[Array | np.ndarray, "B T"] | None,
    key_segment_ids: Int[Array | np.ndarray, "B S"] | None,
    query_offset: Int[Array, ""] | int,
    given: Bool[Array | np.ndarray, "B T S"] | None,
    backend: str = "xla",
) -> Float[Array, "B T N H"]:
    if backend == "cudnn" and query_segment_ids is None:
        # Without segments the kernel needs no stored mask.
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=backend)
    mask = None if given is None else jnp.asarray(given)[:, None]
    if is_causal:
        queries = jnp.arange(q.shape[1], dtype=jnp.int32) + query_offset
        before = (jnp.arange(k.shape[1], dtype=jnp.int32)[None, :] <= queries[:, None])[None, None]
        mask = before if mask is None else mask & before
    if query_segment_ids is not None and key_segment_ids is not None:
        same = (query_segment_ids[:, :, None] == key_segment_ids[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    dtype = q.dtype
    if dtype == jnp.float16 and sharding.platform() == "cpu":
        # There XLA cannot multiply two float16 arrays with a float32 sum.
        q, k, v = (jnp.asarray(each, jnp.float32) for each in (q, k, v))
    with jax.numpy_dtype_promotion("standard"):  # It mixes bfloat16 heads with float32 scores.
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=backend)
    attended = attended.astype(dtype)
    # With a batch of one, XLA's implementation loses the sharding of its operands.
    layout = jax.typeof(q).sharding.spec
    is_kept = jax.typeof(attended).sharding.spec == layout
    return attended if is_kept else jax.sharding.reshard(attended, layout)
