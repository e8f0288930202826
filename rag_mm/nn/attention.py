"""The projections around attention: queries, keys and values in heads, rotary positions, qk-norm."""

from typing import TYPE_CHECKING

import jax
from flax import nnx

from rag_mm.nn import layers
from rag_mm.ops import rope

if TYPE_CHECKING:
    from rag_mm.nn.block import BlockConfig


class Attention(nnx.Module):
    """q, k, v = heads(x); what is done with them is the caller's `attend` (training, prefill, decode)."""

    def __init__(self, config: "BlockConfig", *, rngs: nnx.Rngs):
        c = config
        self.rope_theta = c.rope_theta
        kinds = dict(use_bias=c.use_bias, rngs=rngs, std=c.init_std)
        self.q = layers.Linear(
            (c.embed_dim,), (c.num_heads, c.head_dim), ("embed", "heads", None), **kinds
        )
        kv_shape, kv_axes = (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None)
        self.k = layers.Linear((c.embed_dim,), kv_shape, kv_axes, **kinds)
        self.v = layers.Linear((c.embed_dim,), kv_shape, kv_axes, **kinds)
        self.out = layers.Linear(
            (c.num_heads, c.head_dim),
            (c.embed_dim,),
            ("heads", None, "embed"),
            use_bias=c.use_bias,
            rngs=rngs,
            std=c.output_init_std,
        )
        norm = c.qk_norm
        self.q_norm = (
            layers.Norm("rmsnorm", c.head_dim, rngs=rngs, eps=c.norm_eps) if norm else None
        )
        self.k_norm = (
            layers.Norm("rmsnorm", c.head_dim, rngs=rngs, eps=c.norm_eps) if norm else None
        )

    def heads(
        self, x: jax.Array, positions: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x: [B, T, D], positions: int32 [B, T] -> q [B, T, N, H], k and v [B, T, K, H]."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            q, k = (
                rope.rotate(q, positions, self.rope_theta),
                rope.rotate(k, positions, self.rope_theta),
            )
        return q, k, v
