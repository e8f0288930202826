"""Emu's causal transformer: learned queries read an image's tokens and become vectors of the decoder's width.

A stack of T5's decoder blocks (Raffel et al. 2020): causal self-attention with one table of relative biases,
cross-attention to the image without them, and a ReLU MLP; RMS norms come first, scores are not scaled, and
nothing has a bias but the last linear map. Dropout is left out.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rag_mm.core import sharding
from rag_mm.models.emu.emu_config import CFormerConfig
from rag_mm.nn import layers
from rag_mm.nn.block import REMAT


class CFormerAttention(nnx.Module):
    """T5's attention: unscaled scores plus a bias, softmax in float32."""

    def __init__(self, config: CFormerConfig, kv_dim: int, *, rngs: nnx.Rngs):
        c, heads = config, (config.num_heads, config.head_dim)
        into, axes = (c.embed_dim,), ("embed", "heads", None)
        kwargs: dict[str, Any] = dict(use_bias=False, rngs=rngs)
        std = (c.embed_dim * c.head_dim) ** -0.5
        self.q = layers.Linear(into, heads, axes, std=std, **kwargs)
        self.k = layers.Linear((kv_dim,), heads, axes, std=c.embed_dim**-0.5, **kwargs)
        self.v = layers.Linear((kv_dim,), heads, axes, std=c.embed_dim**-0.5, **kwargs)
        std = (c.num_heads * c.head_dim) ** -0.5
        self.out = layers.Linear(heads, into, ("heads", None, "embed"), std=std, **kwargs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B M C"],
        bias: Float[Array, "H N M"] | None,
    ) -> Float[Array, "B N D"]:
        """What x reads of the context; `bias` is added to the scores, and is -inf where nothing is seen."""
        q, k, v = self.q(x), self.k(context), self.v(context)
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores if bias is None else scores + bias[None], axis=-1)
        return self.out(jnp.einsum("bhnm,bmhd->bnhd", weights.astype(x.dtype), v))


class CFormerBlock(nnx.Module):
    """Self-attention, cross-attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: CFormerConfig, context_dim: int, *, rngs: nnx.Rngs):
        c = config

        def make_norm() -> layers.Norm:
            return layers.Norm("rmsnorm", c.embed_dim, rngs=rngs, eps=c.norm_eps)

        self.attention_norm, self.cross_norm, self.mlp_norm = (make_norm() for _ in range(3))
        self.attention = CFormerAttention(c, c.embed_dim, rngs=rngs)
        self.cross_attention = CFormerAttention(c, context_dim, rngs=rngs)
        width, hidden = (c.embed_dim,), (c.mlp_dim,)
        kwargs: dict[str, Any] = dict(use_bias=False, rngs=rngs)
        std_up, std_down = c.embed_dim**-0.5, c.mlp_dim**-0.5
        self.up = layers.Linear(width, hidden, ("embed", "mlp"), std=std_up, **kwargs)
        self.down = layers.Linear(hidden, width, ("mlp", "embed"), std=std_down, **kwargs)

    def __call__(
        self,
        x: Float[Array, "B N D"],
        context: Float[Array, "B M C"],
        bias: Float[Array, "H N N"],
    ) -> Float[Array, "B N D"]:
        """The residual stream behind the block."""
        own = self.attention_norm(x)
        x = x + self.attention(own, own, bias)
        x = x + self.cross_attention(self.cross_norm(x), context, None)
        return x + self.down(jax.nn.relu(self.up(self.mlp_norm(x))))


class CFormer(nnx.Module):
    """Tokens of an image to `num_queries` vectors of the decoder's width."""

    def __init__(
        self,
        config: CFormerConfig,
        context_dim: int,
        out_dim: int,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        """`context_dim` is the width of an image's tokens, `dtype` that of activations."""
        c = config
        self.config, self.dtype, self.remat = c, dtype, remat
        self.queries = layers.make_param(
            rngs, (c.num_queries, c.embed_dim), (None, "embed"), c.query_std
        )
        self.relative_bias = layers.make_param(
            rngs, (c.num_buckets, c.num_heads), (None, "heads"), c.embed_dim**-0.5
        )
        keys = jax.random.split(rngs.params(), c.num_layers)
        make = lambda key: CFormerBlock(c, context_dim, rngs=nnx.Rngs(params=key))
        self.blocks = jax.vmap(make)(keys)
        self.norm = layers.Norm("rmsnorm", c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.output = layers.Linear(
            (c.embed_dim,), (out_dim,), ("embed", None), use_bias=True, rngs=rngs
        )

    @jax.named_scope("cformer")
    def __call__(self, tokens: Float[Array, "B M C"]) -> Float[Array, "B N D"]:
        """The vectors of B images, in the dtype of activations."""
        queries = sharding.gather(self.queries[...], (None, None)).astype(self.dtype)
        shape = (tokens.shape[0], *queries.shape)
        x = sharding.place(jnp.broadcast_to(queries[None], shape), "batch", None, None)
        return self.output(self.stack(x, tokens.astype(self.dtype)))

    def stack(
        self, x: Float[Array, "B N D"], tokens: Float[Array, "B M C"]
    ) -> Float[Array, "B N D"]:
        """The blocks and the last norm."""
        bias = self._bias(x.shape[1])

        def layer(x: jax.Array, block: CFormerBlock) -> tuple[jax.Array, None]:
            return block(x, tokens, bias), None

        x, _ = jax.lax.scan(REMAT[self.remat](layer), x, self.blocks)
        return self.norm(x)

    def _bias(self, num: int) -> Float[Array, "H N N"]:
        """Relative biases of `num` queries; -inf where a query may not look."""
        c = self.config
        distance = np.arange(num)[None] - np.arange(num)[:, None]
        buckets = relative_buckets(distance, c.num_buckets, c.max_distance, not c.is_causal)
        chosen = jnp.asarray(np.eye(c.num_buckets, dtype=np.float32)[buckets])
        table = sharding.gather(self.relative_bias[...].astype(jnp.float32), (None, "heads"))
        bias = jnp.einsum("nmk,kh->hnm", chosen, table)
        return jnp.where(jnp.asarray(distance > 0)[None], -jnp.inf, bias) if c.is_causal else bias


def relative_buckets(
    distance: Int[np.ndarray, "..."], num_buckets: int, max_distance: int, is_two_sided: bool
) -> Int[np.ndarray, "..."]:
    """T5's buckets of key position minus query position.

    Half of the buckets are of one distance each, the others of ranges that grow up to `max_distance`. If
    `is_two_sided`, keys behind the query have half of all buckets; else they are in bucket 0.
    """
    offset = np.zeros_like(distance)
    if is_two_sided:
        num_buckets //= 2
        offset = np.where(distance > 0, num_buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = num_buckets // 2
    far = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    ranged = np.minimum(exact + (far * (num_buckets - exact)).astype(np.int64), num_buckets - 1)
    return offset + np.where(distance < exact, distance, ranged)
