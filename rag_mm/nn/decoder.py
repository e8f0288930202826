"""One scanned decoder whose config covers every language model here: CM3, CM3Leon, Chameleon, LLaMA.

Its inputs are token ids, vectors, or both (`Mixture`); its outputs are hidden states, from which `logits` are
computed where they are needed. With `context_dim` every block also reads a `Context`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from rag_mm.core import checks, manifest_values, sharding
from rag_mm.nn import layers
from rag_mm.nn.block import REMAT, Attend, Block, BlockConfig, Context, Heads, Stack
from rag_mm.nn.smear import SmearContext
from rag_mm.ops import attention, rope


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Standard deviations of initial weights.

    Attributes:
        std: standard deviation of every matrix and table that has no value below.
        cut: samples are truncated at this many standard deviations; None disables truncation.
        embedding_std: standard deviation of token embeddings; None uses std.
        output_std: standard deviation of the projections that write to the residual stream; None uses
            std / sqrt(2 num_layers).
        position_std: standard deviation of learned position embeddings; None uses std.
        head_std: standard deviation of an untied output head; None uses std.
    """

    std: float = 0.02
    cut: float | None = None
    embedding_std: float | None = dataclasses.field(
        default=None, metadata=manifest_values.ADDED_LATER
    )
    output_std: float | None = None
    position_std: float | None = None
    head_std: float | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and value < 0:
                raise ValueError(f"init.{name} is {value}; give at least 0")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and architecture of a decoder.

    Attributes:
        vocab_size: token ids, text and image codes together; 0: inputs are vectors only, and there is neither
            a table nor a head.
        num_layers: number of transformer blocks.
        embed_dim: width of the residual stream.
        num_heads: number of query heads.
        mlp_dim: hidden width of the MLP.
        max_seq_len: longest sequence, in tokens.
        num_kv_heads: key and value heads (grouped-query attention); None: as many as num_heads.
        head_dim: width of a head; None: embed_dim / num_heads.
        norm: kind of normalization: layernorm | layernorm_no_params | rmsnorm.
        norm_eps: added to the variance for stability.
        positions: kind of position encoding: rope | sinusoidal | learned.
        rope_theta: base of RoPE's wavelengths.
        rope_scaling: LLaMA 3's rescaling of RoPE for long contexts; None disables it.
        mlp: kind of MLP: swiglu | relu | gelu.
        qk_norm: whether queries and keys are normalized per head.
        smear_lags: for each head, the lags whose keys are mixed; () is a plain head. Lag 1 is the previous
            token, the code grid's width the code directly above.
        induction_init: whether a fresh layer attends to what resembles the query and copies what followed it.
        qk_norm_kind: rmsnorm, or layernorm_per_head as in Chameleon.
        post_norm: whether a branch's output is normalized instead of its input.
        use_bias: whether attention and MLP have biases.
        mlp_bias: whether the MLP has biases, if this differs from `use_bias`; None: it does not differ.
        tie_embeddings: whether the output head is the token table.
        scale_embeddings: whether token embeddings are multiplied by sqrt(embed_dim) before positions are
            added, as fairseq does. A tied head multiplies with the table as it is.
        init: standard deviations of initial weights.
        dtype: dtype of activations; softmax, loss and trained parameters stay float32.
        remat: what a layer's backward pass recomputes: none | dots | full.
        context_dim: width of the context that every block reads by cross-attention between its attention and
            its MLP, with as many heads; None: blocks have no cross-attention.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    max_seq_len: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: rope.Llama3Scaling | None = None
    mlp: str = "swiglu"
    qk_norm: bool = False
    smear_lags: tuple[tuple[int, ...], ...] = ()
    induction_init: bool = False
    qk_norm_kind: str = "rmsnorm"
    post_norm: bool = False
    use_bias: bool = False
    mlp_bias: bool | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)
    tie_embeddings: bool = False
    scale_embeddings: bool = dataclasses.field(default=False, metadata=manifest_values.ADDED_LATER)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    dtype: str = "float32"
    remat: str = "none"
    context_dim: int | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        if not all(isinstance(entry, list | tuple) for entry in self.smear_lags):
            raise ValueError(f"smear_lags are {self.smear_lags}; give tuples of lags: ((1, 8), ())")
        # A config read from JSON holds lists, and a static argument must be hashable.
        object.__setattr__(self, "smear_lags", tuple(map(tuple, self.smear_lags)))
        scaling: Any = self.rope_scaling
        if isinstance(scaling, Mapping):  # read from a file
            object.__setattr__(self, "rope_scaling", rope.Llama3Scaling(**scaling))
        init: Any = self.init
        if isinstance(init, Mapping):
            object.__setattr__(self, "init", InitConfig(**init))
        if self.positions not in ("rope", "sinusoidal", "learned"):
            raise ValueError(f"positions are rope, sinusoidal or learned, not {self.positions!r}")
        checks.at_least(self, 0, "vocab_size")
        sizes = ("num_layers", "embed_dim", "num_heads", "mlp_dim", "max_seq_len", "context_dim")
        checks.at_least(self, 1, *sizes)
        checks.one_of(self, "dtype", ("float32", "bfloat16", "float16"))
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}, not {self.remat!r}")
        if self.tie_embeddings and self.init.head_std is not None:
            raise ValueError(
                "a tied head has no init.head_std of its own; untie it or leave it out"
            )
        if not isinstance(self.scale_embeddings, bool):
            raise ValueError(
                f"scale_embeddings is {self.scale_embeddings!r}; give True or False: the factor is "
                "sqrt(embed_dim)"
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
            mlp_bias=self.mlp_bias,
            rope_theta=self.rope_theta if self.positions == "rope" else None,
            rope_scaling=self.rope_scaling,
            init_std=self.init.std,
            output_init_std=self.init.std / (2 * self.num_layers) ** 0.5
            if self.init.output_std is None
            else self.init.output_std,
            init_cut=self.init.cut,
            context_dim=self.context_dim,
        )


class Mixture(NamedTuple):
    """Token ids, and vectors that stand in place of some of them.

    Attributes:
        tokens: ids; those in place of which vectors stand may be any of the vocabulary.
        vectors: read where `is_vector`; finite everywhere.
        is_vector: where they stand.
    """

    tokens: Int[Array | np.ndarray, "B T"]
    vectors: Float[Array | np.ndarray, "B T D"]
    is_vector: Bool[Array | np.ndarray, "B T"]


# Token ids, or vectors of the decoder's width, or both.
Inputs = Int[Array | np.ndarray, "B T"] | Float[Array | np.ndarray, "B T D"] | Mixture


class Decoder(nnx.Module):
    """Maps tokens or vectors to hidden states; `logits` maps these to the vocabulary."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config

        def table(size: int, rows: str | None, std: float | None) -> layers.Embedding:
            std = c.init.std if std is None else std
            return layers.Embedding(
                size, c.embed_dim, std=std, axes=(rows, "embed"), cut=c.init.cut, rngs=rngs
            )

        learned = c.positions == "learned"
        has_words = c.vocab_size > 0
        words = partial(table, c.vocab_size, "vocab")
        self.embedding = words(c.init.embedding_std) if has_words else None
        self.position_embedding = (
            table(c.max_seq_len, None, c.init.position_std) if learned else None
        )
        self.stack = Stack(c.block, c.num_layers, rngs=rngs, remat=c.remat)
        self.norm = layers.Norm(c.norm, c.embed_dim, rngs=rngs, eps=c.norm_eps)
        self.head = words(c.init.head_std) if has_words and not c.tie_embeddings else None

    def __call__(
        self,
        inputs: Inputs,
        positions: Int[Array | np.ndarray, "B T"],
        segment_ids: Int[Array | np.ndarray, "B T"] | None,
        context: Context | None = None,
    ) -> Float[Array, "B T D"]:
        """Causal within a segment.

        Args:
            inputs: token ids, vectors, or a mixture; see `input_vectors`.
            positions: below max_seq_len.
            segment_ids: tokens see earlier tokens of their own segment only. None if every sequence is one
                segment: cuDNN then needs no stored mask and skips the scores above the diagonal.
            context: what blocks with `context_dim` read: all segments of a sequence the same.

        Returns:
            Hidden states after the last norm, in the config's dtype.

        Raises:
            ValueError: there is a context without `context_dim`, or the other way round.
        """
        x, _ = self._run(inputs, positions, segment_ids, context, lambda heads: None)
        return self.norm(x)

    def prefill(
        self,
        inputs: Inputs,
        positions: Int[Array | np.ndarray, "B T"],
        segment_ids: Int[Array | np.ndarray, "B T"],
        context: Context | None = None,
    ) -> tuple[Float[Array, "B T D"], Heads]:
        """Like a call; also returns the heads of every layer without queries, stacked [L, ...].

        Among them are the keys and values of the context, which later steps need not compute again.
        """
        keep = lambda heads: heads._replace(q=None)
        x, heads = self._run(inputs, positions, segment_ids, context, keep)
        return self.norm(x), heads

    def _run(
        self,
        inputs: Inputs,
        positions: Int[Array | np.ndarray, "B T"],
        segment_ids: Int[Array | np.ndarray, "B T"] | None,
        context: Context | None,
        keep: Callable[[Heads], Any],
    ) -> tuple[Float[Array, "B T D"], Any]:
        def attend(heads, _):
            attended = attention.attention(
                heads.q,
                heads.k,
                heads.v,
                is_causal=True,
                query_segment_ids=segment_ids,
                key_segment_ids=segment_ids,
            )
            return attended, keep(heads)

        before = None
        if self.config.smear_lags:
            before = SmearContext(jnp.ones_like(positions) if segment_ids is None else segment_ids)
        if context is not None:
            vectors, mask = jnp.asarray(context.vectors, self.config.dtype), context.mask
            context = Context(
                sharding.place(vectors, "batch", None, None),
                None if mask is None else sharding.place(jnp.asarray(mask), "batch", None),
            )
        rotation = self.config.block.rotation(positions)
        return self.stack(self.embed(inputs, positions), rotation, attend, before, context)

    def extend(
        self,
        inputs: Inputs,
        positions: Int[Array | np.ndarray, "B T"],
        mask: Bool[Array | np.ndarray, "B T S"],
        cached: Heads | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of tokens behind cached ones, where a mask says what each of them sees.

        So several continuations of one beginning may lie in one sequence.

        Args:
            inputs: token ids, vectors, or a mixture.
            positions: below max_seq_len.
            mask: which of the cached tokens, and after them of the given ones, each token sees.
            cached: heads of the cached tokens, from `prefill`; None: there are none.

        Raises:
            ValueError: heads are smeared, or blocks read a context.
        """
        if self.config.smear_lags or self.config.context_dim is not None:
            raise ValueError("tokens under a mask have neither smeared heads nor a context")
        mask = sharding.place(jnp.asarray(mask), "batch", None, None)
        rotation = self.config.block.rotation(positions)

        def attend(heads: Heads, before: Any) -> tuple[jax.Array, None]:
            k, v = heads.k, heads.v
            if before is not None:
                k, v = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
            return attention.attention(heads.q, k, v, is_causal=False, mask=mask), None

        def layer(x: jax.Array, block_and_cached: tuple[Block, Any]) -> tuple[jax.Array, None]:
            block, before = block_and_cached
            return block(x, rotation, attend, before)

        before = None if cached is None else (cached.k, cached.v)
        x = self.embed(inputs, positions)
        x, _ = jax.lax.scan(layer, x, (self.stack.blocks, before))
        return self.norm(x)

    def decode_step(
        self,
        blocks: Block | tuple[Block, ...],
        inputs: Inputs,
        positions: Int[Array, "B T"],
        rotation: rope.Rotation | None,
        attend: Attend,
        cache: tuple,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Decodes the next tokens, or vectors, of every sequence: one, or several drafts at once.

        Args:
            blocks: `stack.unstack()`, computed once outside the decoding loop; or `stack.blocks`, to scan.
            inputs: the current tokens, vectors or mixture; T = 1 in a sequential loop.
            positions: their positions.
            rotation: their rotation. `config.block.rotation` is computed for all positions once, outside the
                loop; None if that is None.
            attend: reads a layer's cache, and returns what is to be kept of the tokens.
            cache: one entry per layer, with attribute `recent` if heads are smeared, and `context` (that of
                `prefill`'s heads) if blocks read one; for a scan one entry of stacked arrays.

        Returns:
            Hidden states after the last norm, and the second results of `attend`, laid out as `cache`.
        """
        same, reads = jnp.ones_like(positions), self.config.context_dim is not None

        def layer(x: jax.Array, block_and_cache: tuple[Block, Any]) -> tuple[jax.Array, Any]:
            block, layer_cache = block_and_cache
            before = SmearContext(same, layer_cache.recent) if self.config.smear_lags else None
            context = layer_cache.context if reads else None
            return block(x, rotation, attend, layer_cache, before, context)

        x = self.embed(inputs, positions)
        if isinstance(blocks, Block):
            x, kept = jax.lax.scan(layer, x, (blocks, cache))
            return self.norm(x), kept
        kept = []
        for block_and_cache in zip(blocks, cache, strict=True):
            x, layer_kept = layer(x, block_and_cache)
            kept.append(layer_kept)
        return self.norm(x), tuple(kept)

    @jax.named_scope("embed")
    def embed(
        self, inputs: Inputs, positions: Int[Array | np.ndarray, "B T"]
    ) -> Float[Array, "B T D"]:
        """`input_vectors`, plus learned or sinusoidal positions, in the config's dtype.

        The sum of scaled embeddings and positions is rounded to that dtype once.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = self.input_vectors(inputs)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions, x.dtype)
        if c.positions == "sinusoidal":
            x = x + rope.sinusoids(positions, c.embed_dim).astype(x.dtype)
        return x.astype(dtype)

    def input_vectors(self, inputs: Inputs) -> Float[Array, "B T D"]:
        """The vectors of all inputs before positions are added: what a given vector stands in place of.

        Embeddings of tokens are scaled if the config says so, given vectors are not. So the result, given as
        vectors, is the same input again; a model that predicts its next input predicts these.

        Returns:
            float32 where embeddings are scaled, elsewhere the config's dtype.

        Raises:
            ValueError: there are tokens, but the decoder has no vocabulary.
        """
        c = self.config
        dtype = jnp.dtype("float32" if c.scale_embeddings else c.dtype)
        if isinstance(inputs, Mixture):
            given, chosen = self.input_vectors(inputs.vectors), jnp.asarray(inputs.is_vector)
            chosen = sharding.place(chosen, "batch", None)[:, :, None]
            return jnp.where(chosen, given, self.input_vectors(inputs.tokens))
        if jnp.issubdtype(inputs.dtype, jnp.floating):
            return sharding.place(jnp.asarray(inputs, dtype), "batch", None, None)
        if self.embedding is None:
            raise ValueError("a decoder without a vocabulary takes vectors, not tokens")
        x = self.embedding(inputs, jnp.dtype(c.dtype))
        return x.astype(jnp.float32) * math.sqrt(c.embed_dim) if c.scale_embeddings else x

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Logits of the next token, from hidden states; summed in float32 and not rounded to their dtype.

        Raises:
            ValueError: the decoder has no vocabulary.
        """
        head = self.embedding if self.head is None else self.head
        if head is None:
            raise ValueError("a decoder without a vocabulary has no logits")
        return head.attend(hidden)
