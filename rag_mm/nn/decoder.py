"""One scanned decoder whose config covers every language model here: CM3, CM3Leon, Chameleon, LLaMA."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rag_mm.nn import layers
from rag_mm.nn.block import REMAT, Attend, Block, BlockConfig, Heads, Stack
from rag_mm.nn.smear import SmearContext
from rag_mm.ops import attention, rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and family; a weight converter is a table of names over these values."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    max_seq_len: int
    num_kv_heads: int | None = None  # None: as many as num_heads
    head_dim: int | None = None  # None: embed_dim / num_heads
    norm: str = "rmsnorm"  # layernorm | layernorm_no_params | rmsnorm
    norm_eps: float = 1e-5
    positions: str = "rope"  # rope | sinusoidal | learned
    rope_theta: float = 10_000.0
    rope_scaling: rope.Llama3Scaling | None = None
    mlp: str = "swiglu"  # swiglu | relu | gelu
    qk_norm: bool = False
    # What heads look back by, () for plain heads: 1 is the token before, an image's width the code above.
    smear_lags: tuple[tuple[int, ...], ...] = ()
    induction_init: bool = False  # a fresh layer finds what resembles the query and passes it on
    qk_norm_kind: str = "rmsnorm"  # rmsnorm, or layernorm_per_head as in Chameleon
    post_norm: bool = False  # norm a branch's output instead of its input
    use_bias: bool = False
    tie_embeddings: bool = False
    init_std: float = 0.02
    init_cut: float | None = None  # draws are cut at this many standard deviations
    output_init_std: float | None = None  # None: init_std / sqrt(2 num_layers)
    position_init_std: float | None = None  # None: init_std
    head_init_std: float | None = None  # of an untied head; None: init_std
    # Of activations; softmax and loss stay float32, as do parameters trained here.
    dtype: str = "float32"
    remat: str = "none"  # none | dots | full: what a layer's backward pass computes again

    def __post_init__(self):
        if not all(isinstance(entry, list | tuple) for entry in self.smear_lags):
            raise ValueError(f"smear_lags are {self.smear_lags}, give tuples of lags: ((1, 8), ())")
        # A config read from JSON holds lists, and a static argument must be hashable.
        object.__setattr__(self, "smear_lags", tuple(map(tuple, self.smear_lags)))
        scaling: Any = self.rope_scaling
        if isinstance(scaling, Mapping):  # read from a file
            object.__setattr__(self, "rope_scaling", rope.Llama3Scaling(**scaling))
        if self.positions not in ("rope", "sinusoidal", "learned"):
            raise ValueError(f"positions are rope, sinusoidal or learned, not {self.positions!r}")
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "num_heads",
            "mlp_dim",
            "max_seq_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, give at least 1")
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}, not {self.remat!r}")
        if self.tie_embeddings and self.head_init_std is not None:
            raise ValueError(
                "a tied head has no head_init_std of its own; untie it or leave it out"
            )
        if self.norm not in layers.NORMS:
            raise ValueError(f"norm is one of {', '.join(layers.NORMS)}, not {self.norm!r}")
        if self.qk_norm_kind not in ("rmsnorm", "layernorm_per_head"):
            raise ValueError(
                f"qk_norm_kind is rmsnorm or layernorm_per_head, not {self.qk_norm_kind!r}"
            )
        if self.mlp != "swiglu" and self.mlp not in layers.ACTIVATIONS:
            known = ", ".join(layers.ACTIVATIONS)
            raise ValueError(f"mlp is swiglu or one of {known}, not {self.mlp!r}")

    @property
    def block(self) -> BlockConfig:
        """The block's share of this config."""
        return BlockConfig(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim,
            norm=self.norm,
            norm_eps=self.norm_eps,
            mlp=self.mlp,
            qk_norm=self.qk_norm,
            smear_lags=self.smear_lags,
            induction_init=self.induction_init,
            qk_norm_kind=self.qk_norm_kind,
            post_norm=self.post_norm,
            use_bias=self.use_bias,
            rope_theta=self.rope_theta if self.positions == "rope" else None,
            rope_scaling=self.rope_scaling,
            init_std=self.init_std,
            output_init_std=self.init_std / (2 * self.num_layers) ** 0.5
            if self.output_init_std is None
            else self.output_init_std,
            init_cut=self.init_cut,
        )


class Decoder(nnx.Module):
    """Token ids in, hidden states out; `logits` maps them onto the vocabulary."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config

        def table(size: int, rows: str | None, std: float | None) -> layers.Embedding:
            kinds = dict(axes=(rows, "embed"), cut=c.init_cut, rngs=rngs)
            return layers.Embedding(
                size, c.embed_dim, std=c.init_std if std is None else std, **kinds
            )

        learned = c.positions == "learned"
        self.embedding = table(c.vocab_size, "vocab", None)
        self.position_embedding = (
            table(c.max_seq_len, None, c.position_init_std) if learned else None
        )
        self.stack = Stack(c.block, c.num_layers, rngs=rngs, remat=c.remat)
        self.norm = layers.Norm(c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.head = None if c.tie_embeddings else table(c.vocab_size, "vocab", c.head_init_std)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """Causal within a segment.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], below max_seq_len.
            segment_ids: int32 [B, T]; tokens see earlier tokens of their own segment only. None where every
                row is one segment: cuDNN then needs no stored mask, and skips what lies above the diagonal.

        Returns:
            Hidden states [B, T, D] after the last norm, in the config's dtype.
        """

        x, _ = self._run(tokens, positions, segment_ids, lambda heads: None)
        return self.norm(x)

    def prefill(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, Heads]:
        """Like a call, and also the heads of every layer without queries, each stacked [L, ...]."""
        x, heads = self._run(tokens, positions, segment_ids, lambda heads: heads._replace(q=None))
        return self.norm(x), heads

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        keep: Callable[[Heads], Any],
    ) -> tuple[jax.Array, Any]:

        def attend(heads, _):
            masked = attention.attention(
                heads.q,
                heads.k,
                heads.v,
                is_causal=True,
                query_segment_ids=segment_ids,
                key_segment_ids=segment_ids,
            )
            return masked, keep(heads)

        before = None
        if self.config.smear_lags:
            before = SmearContext(jnp.ones_like(tokens) if segment_ids is None else segment_ids)
        rotation = self.config.block.rotation(positions)
        return self.stack(self.embed(tokens, positions), rotation, attend, before)

    def decode_step(
        self,
        blocks: tuple[Block, ...],
        tokens: jax.Array,
        positions: jax.Array,
        rotation: rope.Rotation | None,
        attend: Attend,
        cache: tuple,
    ) -> tuple[jax.Array, tuple]:
        """One token a row, int32 [B, 1], against a cache a layer that `attend` reads and updates.

        Where heads are smeared a layer's cache has the `recent` ones.

        `blocks` is `stack.unstack()`, made once outside the decoding loop. So is `config.block.rotation` of
        all positions to come, of which `rotation` is this token's; None where it is None.
        """
        x, updated = self.embed(tokens, positions), []
        same = jnp.ones_like(tokens)
        for block, layer_cache in zip(blocks, cache, strict=True):
            before = SmearContext(same, layer_cache.recent) if self.config.smear_lags else None
            x, layer_cache = block(x, rotation, attend, layer_cache, before)
            updated.append(layer_cache)
        return self.norm(x), tuple(updated)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Token (and absolute position) vectors, [B, T, D]."""
        dtype = jnp.dtype(self.config.dtype)
        x = self.embedding(tokens, dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions, dtype)
        if self.config.positions == "sinusoidal":
            x = x + rope.sinusoids(positions, self.config.embed_dim).astype(dtype)
        return x

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, V]."""
        head = self.embedding if self.head is None else self.head
        return head.attend(hidden).astype(jnp.float32)
