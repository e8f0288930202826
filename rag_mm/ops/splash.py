"""Causal self-attention on a TPU: jax's splash kernel, which never stores the scores.

One call a device under `shard_map`: rows and heads are split, sequences are not.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

from rag_mm.core import sharding

# Names under which a checkpoint policy may keep what the kernel's backward pass reads.
RESIDUALS = ("splash_residuals",)
LANES = 128  # sequences come in multiples of it
MAX_BLOCK = 512


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    is_interpreted: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, causal, within a segment.

    Args:
        q: [B, T, N, H], T a multiple of 128.
        k, v: [B, T, K, H], K dividing N.
        segment_ids: int32 [B, T] or None.
        is_interpreted: run the kernel's own steps on any device; for tests.

    Returns:
        [B, T, N, H] in q's dtype; softmax is float32.
    """
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    operands = [heads_first(q * scale), heads_first(k), heads_first(v)]
    specs = [sharding.activation_spec("batch", axis, None, None) for axis in ("heads", "kv_heads")]
    in_specs = [specs[0], specs[1], specs[1]]
    if segment_ids is not None:
        operands.append(segment_ids)
        in_specs.append(sharding.activation_spec("batch", None))
    attend = functools.partial(_attend, is_interpreted=is_interpreted)
    if specs[0] is not None:
        attend = jax.shard_map(
            attend, in_specs=tuple(in_specs), out_specs=specs[0], check_vma=False
        )
    # The kernel mixes dtypes and ranks as jax does by default.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return heads_first(attend(*operands)).astype(q.dtype)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    is_interpreted: bool,
) -> jax.Array:
    """One device's share: q [B, N, T, H], k and v [B, K, T, H]."""
    num_heads, length = q.shape[1:3]
    kernel = _make_kernel(num_heads, length, is_interpreted)
    if segment_ids is None:
        return jax.vmap(kernel)(q, k, v)
    pairs = kernel_lib.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(q, k, v, pairs)


def _make_kernel(
    num_heads: int, length: int, is_interpreted: bool
) -> kernel_lib.SplashAttentionKernel:
    block = max(size for size in range(LANES, MAX_BLOCK + 1, LANES) if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask_lib.CausalMask((length, length))] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel_lib.BlockSizes(**{f"block_{name}": block for name in names}),
        residual_checkpoint_name=RESIDUALS[0],
        interpret=is_interpreted,
    )
