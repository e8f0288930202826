"""One pre-norm transformer block for every model here, and the stack that scans over its layers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rag_mm.nn import layers
from rag_mm.ops import rope


class Heads(NamedTuple):
    """q [B, T, N, H], k and v [B, T, K, H]; `newest`, [B, 1, K, H], is the last key before smearing."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    newest: jax.Array | None = None


# (heads, what this layer was handed) -> (attended [B, T, N, H], what this layer hands back).
Attend = Callable[[Heads, Any], tuple[jax.Array, Any]]


class Before(NamedTuple):
    """What smearing must know of the past: whether a token goes on from the one before it, bool [B, T],
    and the `newest` key before the first one, None where nothing stands before it."""

    is_continued: jax.Array
    newest: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Shape and family of one block (design: one decoder, many families)."""

    embed_dim: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int
    head_dim: int
    norm: str = "rmsnorm"  # layernorm | layernorm_no_params | rmsnorm
    norm_eps: float = 1e-5
    mlp: str = "swiglu"  # swiglu, or the activation of a two-matrix MLP: relu | gelu | quick_gelu
    qk_norm: bool = False
    # The norm of q and k: rmsnorm, one for all heads, or layernorm_per_head (Chameleon).
    qk_norm_kind: str = "rmsnorm"
    post_norm: bool = False  # the branch's output is normed, not its input (Swin V2, Chameleon 34B)
    smear_keys: bool = False  # each head's key is mixed with the token's before: Olsson et al. 2022
    use_bias: bool = False
    rope_theta: float | None = 10_000.0  # None: positions are added to the embeddings instead
    rope_scaling: rope.Llama3Scaling | None = None
    init_std: float | None = None  # None: 1 / sqrt(fan in)
    output_init_std: float | None = None  # of the projections that end in the residual stream


class Attention(nnx.Module):
    """q, k, v = heads(x); what is done with them is the caller's `attend` (training, prefill, decode)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        c = config
        self.rope_theta, self.rope_scaling = c.rope_theta, c.rope_scaling
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
        self.q_norm = _qk_norm(c, (c.num_heads, "heads"), rngs=rngs) if c.qk_norm else None
        self.k_norm = _qk_norm(c, (c.num_kv_heads, "kv_heads"), rngs=rngs) if c.qk_norm else None

        zeros = jnp.zeros(c.num_kv_heads, jnp.float32)
        self.smear = nnx.Param(zeros, axes=("kv_heads",)) if c.smear_keys else None

    def heads(
        self, x: jax.Array, positions: jax.Array | None, before: Before | None = None
    ) -> Heads:
        """x: [B, T, D], positions: int32 [B, T]; `before` is needed where keys are smeared."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        newest = None
        if self.smear is not None:
            if before is None:
                raise ValueError("smeared keys need to know which token goes on from which")
            newest = k[:, -1:]
            k = _smear(k, jax.nn.sigmoid(self.smear[...]).astype(k.dtype), before)
        if self.rope_theta is not None:
            q, k = (
                rope.rotate(q, positions, self.rope_theta, self.rope_scaling),
                rope.rotate(k, positions, self.rope_theta, self.rope_scaling),
            )
        return Heads(q, k, v, newest)


def _qk_norm(config: BlockConfig, heads: tuple[int, str], *, rngs: nnx.Rngs) -> layers.Norm:
    if config.qk_norm_kind == "layernorm_per_head":
        # Chameleon's epsilon here is fixed, whatever its other norms have.
        return layers.Norm("layernorm", config.head_dim, rngs=rngs, eps=1e-5, heads=heads)
    return layers.Norm("rmsnorm", config.head_dim, rngs=rngs, eps=config.norm_eps)


def _smear(k: jax.Array, share: jax.Array, before: Before) -> jax.Array:
    """(1 - share) k[t] + share k[t - 1], share [K]; nothing stands before a first token."""
    first = jnp.zeros_like(k[:, :1]) if before.newest is None else before.newest
    previous = jnp.concatenate([first, k[:, :-1]], axis=1)
    share = share[None, None, :, None]
    return k * (1 - share) + previous * (
        share * before.is_continued[:, :, None, None].astype(k.dtype)
    )


class MLP(nnx.Module):
    """Two matrices and an activation, or SwiGLU's three."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        c = config
        self.activation = "silu" if c.mlp == "swiglu" else c.mlp
        kinds = dict(use_bias=c.use_bias, rngs=rngs)
        into = ((c.embed_dim,), (c.mlp_dim,), ("embed", "mlp"))
        self.gate = layers.Linear(*into, std=c.init_std, **kinds) if c.mlp == "swiglu" else None
        self.up = layers.Linear(*into, std=c.init_std, **kinds)
        self.down = layers.Linear(
            (c.mlp_dim,), (c.embed_dim,), ("mlp", "embed"), std=c.output_init_std, **kinds
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        act = layers.ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); norm(attention(x)), norm(mlp(x)) by `post_norm`."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        c = config
        self.post_norm = c.post_norm
        self.attention_norm = layers.Norm(c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.attention = Attention(c, rngs=rngs)
        self.mlp_norm = layers.Norm(c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        attend: Attend,
        handed: Any = None,
        before: Before | None = None,
    ) -> tuple[jax.Array, Any]:
        """x: [B, T, D] -> ([B, T, D], what `attend` hands back)."""
        asks = x if self.post_norm else self.attention_norm(x)
        attended, back = attend(self.attention.heads(asks, positions, before), handed)
        added = self.attention.out(attended)
        if self.post_norm:
            x = x + self.attention_norm(added)
            return x + self.mlp_norm(self.mlp(x)), back
        x = x + added
        return x + self.mlp(self.mlp_norm(x)), back


class Stack(nnx.Module):
    """`num_layers` blocks whose parameters lie stacked along a leading `layers` axis."""

    def __init__(self, config: BlockConfig, num_layers: int, *, rngs: nnx.Rngs):
        self.num_layers = num_layers
        keys = jax.random.split(rngs.params(), num_layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        attend: Attend,
        before: Before | None = None,
    ) -> tuple[jax.Array, Any]:
        """Scans over layers; what every layer hands back comes stacked along axis 0."""

        def layer(x, block):
            return block(x, positions, attend, before=before)

        return jax.lax.scan(layer, x, self.blocks)

    def unstack(self) -> tuple[Block, ...]:
        """The blocks one by one: decoding unrolls them so that each layer's cache stays in place."""
        return tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], self.blocks) for i in range(self.num_layers)
        )
