"""The transformer block of every model here, and the stack that scans over its layers.

A block may have a second attention, whose keys and values are those of a context (`CrossAttention`): vectors
of an image encoder, for example, that every token may read.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from rag_mm.core import sharding
from rag_mm.nn import layers
from rag_mm.nn.smear import Recent, SmearContext, lags_of_dims, smear
from rag_mm.ops import attention, rope, splash


class Context(NamedTuple):
    """What blocks with cross-attention read.

    Attributes:
        vectors: in the dtype of the activations; C is `BlockConfig.context_dim`.
        mask: True where a vector counts; None: everywhere. A sequence for which none counts reads zeros.
    """

    vectors: Float[Array, "B M C"]
    mask: Bool[Array, "B M"] | None = None


class ContextHeads(NamedTuple):
    """One layer's keys and values of a context, or with a leading axis those of all layers; and its mask."""

    k: Float[Array, "*L B M K H"]
    v: Float[Array, "*L B M K H"]
    mask: Bool[Array, "*L B M"] | None = None


class Heads(NamedTuple):
    """Queries, keys and values; `recent` only if heads are smeared, `context` only if there is one."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    recent: Recent | None = None
    context: ContextHeads | None = None


MAX_UNROLLED = (
    4  # A CPU unrolls stacks up to this depth; for deeper ones the program would get too large.
)
INDUCTION_SMEAR = (
    2.0  # Initial logit of `init_induction`: sigmoid(2) = 0.88 is the lagged token's share.
)

# (heads, the layer's cache or None) -> (attended values, the updated cache or any output per layer).
Attend = Callable[[Heads, Any], tuple[Float[Array, "B T N H"], Any]]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes and family of one block."""

    embed_dim: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int
    head_dim: int
    norm: str = "rmsnorm"  # layernorm | layernorm_no_params | rmsnorm
    norm_eps: float = 1e-5
    mlp: str = (
        "swiglu"  # swiglu, or a two-matrix MLP's activation: relu | gelu | gelu_tanh | quick_gelu
    )
    qk_norm: bool = False
    smear_lags: tuple[
        tuple[int, ...], ...
    ] = ()  # see `smear`; heads are split evenly over the entries
    induction_init: bool = False  # see `Attention.init_induction`
    # The norm of q and k: rmsnorm, shared by all heads, or layernorm_per_head (Chameleon).
    qk_norm_kind: str = "rmsnorm"
    post_norm: bool = False  # norm the branch's output, not its input (Swin V2, Chameleon 34B)
    use_bias: bool = False
    mlp_bias: bool | None = None  # None: as use_bias
    rope_theta: float | None = 10_000.0  # None: positions are added to the embeddings instead
    rope_scaling: rope.Llama3Scaling | None = None
    init_std: float | None = None  # None: 1 / sqrt(fan in)
    output_init_std: float | None = None  # of the projections that write to the residual stream
    init_cut: float | None = None  # truncate samples at this many standard deviations
    context_dim: int | None = None  # width of the context that is read; None: no cross-attention

    def __post_init__(self):
        lags = self.smear_lags
        all_lags = [lag for entry in lags for lag in entry]
        if lags and (min(all_lags, default=0) < 1 or self.num_kv_heads % len(lags)):
            raise ValueError(
                f"smear_lags are {lags}; give tuples of lags of at least 1, not all empty, and a number of "
                f"tuples that divides the {self.num_kv_heads} key heads"
            )
        if max(map(len, lags), default=0) > max(self.head_dim // 2, 1):
            raise ValueError(
                f"smear_lags are {lags}: a head of {self.head_dim} holds at most {self.head_dim // 2} lags"
            )
        if self.induction_init and self.num_kv_heads != self.num_heads:
            raise ValueError(
                "induction_init needs as many key heads as query heads, not "
                f"{self.num_kv_heads} for {self.num_heads}"
            )

    def rotation(self, positions: Int[Array | np.ndarray, "B T"]) -> rope.Rotation | None:
        """The rotation of q and k, shared by all layers; None without rotary positions."""
        if self.rope_theta is None:
            return None
        return rope.make_rotation(positions, self.head_dim, self.rope_theta, self.rope_scaling)


# What the forward pass stores for the backward pass, by `Stack`'s remat. none: everything. dots: products
# with parameters and the output of attention. full: each layer's input only.
ATTENDED = "attended"
_dots = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENDED, *splash.RESIDUALS),
)
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "dots": lambda layer: jax.checkpoint(layer, policy=_dots),
    "full": jax.checkpoint,
}


class Attention(nnx.Module):
    """Projections to q, k, v and back; the caller's `attend` joins them (training, prefill, decode)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs, kv_dim: int | None = None):
        """Keys and values are of vectors of width `kv_dim`; None: of those of the queries."""
        c = config
        kwargs = dict(use_bias=c.use_bias, rngs=rngs, std=c.init_std, cut=c.init_cut)
        self.q = layers.Linear(
            (c.embed_dim,), (c.num_heads, c.head_dim), ("embed", "heads", None), **kwargs
        )
        kv_shape, kv_axes = (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None)
        self.k = layers.Linear((kv_dim or c.embed_dim,), kv_shape, kv_axes, **kwargs)
        self.v = layers.Linear((kv_dim or c.embed_dim,), kv_shape, kv_axes, **kwargs)
        self.out = layers.Linear(
            (c.num_heads, c.head_dim),
            (c.embed_dim,),
            ("heads", None, "embed"),
            use_bias=c.use_bias,
            rngs=rngs,
            std=c.output_init_std,
            cut=c.init_cut,
        )
        self.q_norm = _qk_norm(c, (c.num_heads, "heads"), rngs=rngs) if c.qk_norm else None
        self.k_norm = _qk_norm(c, (c.num_kv_heads, "kv_heads"), rngs=rngs) if c.qk_norm else None

        self.smear_lags = c.smear_lags

        # Logits: initially the lagged token's share is sigmoid(0) = 1/2.
        def logit_share(size: int, axis: str) -> nnx.Param | None:
            zeros = jnp.zeros(size, jnp.float32)
            return nnx.Param(zeros, axes=(axis,)) if c.smear_lags else None

        self.q_smear = logit_share(c.num_heads, "heads")
        self.k_smear = logit_share(c.num_kv_heads, "kv_heads")
        if c.induction_init:
            self.init_induction()

    def init_induction(self) -> None:
        """Initializes heads with a lag to attend to tokens like the query and to copy their values.

        Their key projection is that of the queries, and the output projection the transpose of the values'
        (mimetic initialization, Trockman & Kolter 2023). With smeared heads this gives the induction heads of
        Olsson et al. 2022 before the first step; otherwise training would have to learn both parts together.
        """
        num_heads = self.q.kernel.shape[1]
        looks_back = jnp.array(lags_of_dims(self.smear_lags or ((1,),), num_heads, 1))[:, 0] > 0
        q, k, v, out = (part.kernel[...] for part in (self.q, self.k, self.v, self.out))
        self.k.kernel[...] = jnp.where(looks_back[None, :, None], q, k)
        self.out.kernel[...] = jnp.where(
            looks_back[:, None, None], jnp.transpose(v, (1, 2, 0)), out
        )
        for smeared in (self.q_smear, self.k_smear):
            if smeared is not None:
                smeared[...] = smeared[...] + INDUCTION_SMEAR

    @jax.named_scope("qkv")
    def heads(
        self,
        x: Float[Array, "B T D"],
        rotation: rope.Rotation | None,
        before: SmearContext | None = None,
    ) -> Heads:
        """Queries, keys and values of x; smeared heads need `before`."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        recent = None
        if self.q_smear is not None and self.k_smear is not None:
            if before is None:
                raise ValueError(
                    "smeared heads need the segment ids: pass a SmearContext as `before`"
                )
            past = before.recent or (None, None)
            of_q, of_k = (lags_of_dims(self.smear_lags, *x.shape[2:]) for x in (q, k))
            ahead, width = np.maximum(of_q - 1, 0), max(map(max, filter(None, self.smear_lags)))
            q, *last = smear(q, past[0], before.segment_ids, self.q_smear[...], ahead, width)
            k, *last[1:] = smear(k, past[1], before.segment_ids, self.k_smear[...], of_k, width)
            recent = Recent(*last)
        if rotation is not None:
            q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        return Heads(q, k, v, recent)


def _qk_norm(config: BlockConfig, heads: tuple[int, str], *, rngs: nnx.Rngs) -> layers.Norm:
    if config.qk_norm_kind == "layernorm_per_head":
        # Chameleon's epsilon here does not follow its config.
        return layers.Norm("layernorm", config.head_dim, rngs=rngs, eps=1e-5, heads=heads)
    return layers.Norm("rmsnorm", config.head_dim, rngs=rngs, eps=config.norm_eps)


class CrossAttention(Attention):
    """Attention of every token to a context; heads are neither rotated nor smeared."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        plain = dataclasses.replace(config, smear_lags=(), induction_init=False)
        super().__init__(plain, rngs=rngs, kv_dim=config.context_dim)

    @jax.named_scope("read")
    def read(self, context: Context) -> ContextHeads:
        """The context's keys and values."""
        k, v = self.k(context.vectors), self.v(context.vectors)
        return ContextHeads(k if self.k_norm is None else self.k_norm(k), v, context.mask)

    @jax.named_scope("cross_attention")
    def __call__(self, x: Float[Array, "B T D"], context: ContextHeads) -> Float[Array, "B T D"]:
        """What the tokens x read."""
        q = self.q(x) if self.q_norm is None else self.q_norm(self.q(x))
        k, v, mask = context
        segments: dict[str, jax.Array] = {}
        if mask is not None:  # As segment ids: of every query 1, of a vector that counts 1.
            segments = dict(
                query_segment_ids=jnp.ones(q.shape[:2], jnp.int32),
                key_segment_ids=mask.astype(jnp.int32),
            )
        attended = attention.attention(q, k, v, is_causal=False, **segments)
        if mask is not None:
            attended = attended * mask.any(axis=1)[:, None, None, None].astype(attended.dtype)
        return self.out(jax.ad_checkpoint.checkpoint_name(attended, ATTENDED))


class MLP(nnx.Module):
    """Two matrices and an activation, or SwiGLU with three matrices."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        c = config
        self.activation = "silu" if c.mlp == "swiglu" else c.mlp
        use_bias = c.use_bias if c.mlp_bias is None else c.mlp_bias
        kwargs = dict(use_bias=use_bias, rngs=rngs, cut=c.init_cut)
        into = ((c.embed_dim,), (c.mlp_dim,), ("embed", "mlp"))
        self.gate = layers.Linear(*into, std=c.init_std, **kwargs) if c.mlp == "swiglu" else None
        self.up = layers.Linear(*into, std=c.init_std, **kwargs)
        self.down = layers.Linear(
            (c.mlp_dim,), (c.embed_dim,), ("mlp", "embed"), std=c.output_init_std, **kwargs
        )

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        act = layers.ACTIVATIONS[self.activation]
        hidden = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(hidden)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `post_norm`, norms follow the branches.

    With `context_dim` there is x + cross_attention(norm(x), context) between the two.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        c = config
        self.post_norm = c.post_norm
        self.attention_norm = layers.Norm(c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.attention = Attention(c, rngs=rngs)
        self.mlp_norm = layers.Norm(c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.mlp = MLP(c, rngs=rngs)
        # Made last: the other parameters are those of the block without it.
        reads = c.context_dim is not None
        make_norm = partial(layers.Norm, c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.cross_norm = make_norm() if reads else None
        self.cross_attention = CrossAttention(c, rngs=rngs) if reads else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: rope.Rotation | None,
        attend: Attend,
        cache: Any = None,
        before: SmearContext | None = None,
        context: Context | ContextHeads | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Applies the block.

        Args:
            x: the residual stream.
            rotation: see `BlockConfig.rotation`.
            attend: computes attention; called once with this layer's heads and `cache`.
            cache: passed to `attend`.
            before: segment ids and recent heads, if heads are smeared.
            context: what cross-attention reads, or its keys and values from an earlier call, where they are
                the `context` of the heads that `attend` gets.

        Returns:
            The residual stream, and the second result of `attend`.

        Raises:
            ValueError: there is a context without cross-attention, or cross-attention without a context.
        """
        if (context is None) != (self.cross_attention is None):
            raise ValueError("give a context exactly where blocks have a context_dim to read it")
        attention_input = x if self.post_norm else self.attention_norm(x)
        heads = self.attention.heads(attention_input, rotation, before)
        if self.cross_attention is not None and isinstance(context, Context):
            context = self.cross_attention.read(context)
        if context is not None:
            heads = heads._replace(context=context)
        attended, cache = attend(heads, cache)
        attended = jax.ad_checkpoint.checkpoint_name(attended, ATTENDED)
        added = self.attention.out(attended)
        x = x + (self.attention_norm(added) if self.post_norm else added)
        if self.cross_attention is not None and self.cross_norm is not None:
            cross, given = self.cross_attention, heads.context
            x = x + self._branch(self.cross_norm, lambda x: cross(x, given), x)
        return x + self._branch(self.mlp_norm, self.mlp, x), cache

    def _branch(
        self, norm: layers.Norm, function: Callable[..., jax.Array], x: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """What a branch adds to the residual stream x."""
        return norm(function(x)) if self.post_norm else function(norm(x))


class Stack(nnx.Module):
    """`num_layers` blocks whose parameters are stacked along a leading `layers` axis."""

    def __init__(
        self, config: BlockConfig, num_layers: int, *, rngs: nnx.Rngs, remat: str = "none"
    ):
        """`remat` is a key of REMAT."""
        self.num_layers = num_layers
        self.remat = remat
        keys = jax.random.split(rngs.params(), num_layers)
        self.blocks = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: rope.Rotation | None,
        attend: Attend,
        before: SmearContext | None = None,
        context: Context | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Scans over the layers; the second result of `attend` is stacked along axis 0."""

        @jax.named_scope("block")
        def layer(x, block):
            return block(x, rotation, attend, before=before, context=context)

        # A loop stacks the residuals of all layers, which costs a CPU an extra write and read.
        is_short = sharding.platform() == "cpu" and self.num_layers <= MAX_UNROLLED
        unroll = self.num_layers if is_short else 1
        return jax.lax.scan(REMAT[self.remat](layer), x, self.blocks, unroll=unroll)

    def unstack(self) -> tuple[Block, ...]:
        """The blocks one by one, for loops that unroll them; copies the parameters inside a program."""
        return tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], self.blocks) for i in range(self.num_layers)
        )
