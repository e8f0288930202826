"""Causal self-attention on a TPU: JAX's splash kernel, which never stores the scores.

It runs under `shard_map`: batch and heads are sharded, positions are not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jaxtyping import Array, Float, Int

from rag_mm.core import sharding

# Names by which a checkpoint policy can save the residuals of the kernel's backward pass.
RESIDUALS = ("splash_residuals",)
LANES = 128  # sequence lengths are multiples of it
MAX_BLOCK = 512


def splash_attention(
    q: Float[Array | np.ndarray, "B T N H"],
    k: Float[Array | np.ndarray, "B T K H"],
    v: Float[Array | np.ndarray, "B T K H"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None,
    *,
    is_interpreted: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, causal and within segments; softmax is float32.

    Args:
        q: queries; T is a multiple of 128.
        k, v: keys and values; K divides N.
        segment_ids: None if every sequence is one segment.
        is_interpreted: interprets the kernel on any device, for tests.

    Returns:
        The attended values in q's dtype.
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
    # The kernel relies on JAX's default promotion of dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return heads_first(attend(*operands)).astype(q.dtype)


def _attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    *,
    is_interpreted: bool,
) -> Float[Array, "B N T H"]:
    """The attention of one device's sequences and heads."""
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
