"""One pre-norm transformer block for every model here, and the stack that scans over its layers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from rag_mm.nn import layers
from rag_mm.nn.attention import Attention

# (q, k, v, what this layer was handed) -> (attended [B, T, N, H], what this layer hands back).
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


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
    use_bias: bool = False
    rope_theta: float | None = 10_000.0  # None: positions are added to the embeddings instead
    init_std: float | None = None  # None: 1 / sqrt(fan in)
    output_init_std: float | None = None  # of the projections that end in the residual stream


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
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        c = config
        self.attention_norm = layers.Norm(c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.attention = Attention(c, rngs=rngs)
        self.mlp_norm = layers.Norm(c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(
        self, x: jax.Array, positions: jax.Array | None, attend: Attend, handed: Any = None
    ) -> tuple[jax.Array, Any]:
        """x: [B, T, D] -> ([B, T, D], what `attend` hands back)."""
        q, k, v = self.attention.heads(self.attention_norm(x), positions)
        attended, back = attend(q, k, v, handed)
        x = x + self.attention.out(attended)
        return x + self.mlp(self.mlp_norm(x)), back


class Stack(nnx.Module):
    """`num_layers` blocks whose parameters lie stacked along a leading `layers` axis."""

    def __init__(self, config: BlockConfig, num_layers: int, *, rngs: nnx.Rngs):
        self.num_layers = num_layers
        keys = jax.random.split(rngs.params(), num_layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)

    def __call__(
        self, x: jax.Array, positions: jax.Array | None, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Scans over layers; what every layer hands back comes stacked along axis 0."""

        def layer(x, block):
            return block(x, positions, attend)

        return jax.lax.scan(layer, x, self.blocks)

    def unstack(self) -> tuple[Block, ...]:
        """The blocks one by one: decoding unrolls them so that each layer's cache stays in place."""
        return tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], self.blocks) for i in range(self.num_layers)
        )
