"""RECO (Iscen et al., ICLR 2024, arXiv 2306.07196): frozen CLIP embeddings refined by retrieval.

An embedding retrieves similar items from a memory of image-text pairs, and one light transformer layer fuses
their counterparts of the other modality into it. See docs/papers/reco.md.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from rag_mm.core import sharding
from rag_mm.models.clip import MAX_LOGIT_SCALE
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.nn.block import REMAT, Block, BlockConfig, Heads, Stack
from rag_mm.ops import attention, contrastive

MODALITIES = ("image", "text")
# Pairs that the loss contrasts: `image` and `text` are frozen embeddings, `refined` ones are after fusion.
LOSS_TERMS = ("refined_refined", "refined_text", "image_refined")
REFINE = ("none", "image", "text", "both")


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Which modality queries are compared with, and which modality of the hits is fused.

    `uni` is the query's modality, `cross` the other one. RECO uses uni-modal search and cross-modal fusion
    (docs/papers/reco.md#search-and-fusion); the
    other combinations are its ablations.

    Attributes:
        search: uni | cross, the modality that queries are compared with.
        fuse: uni | cross, the modality of the hits that is fused.
    """

    search: str = "uni"
    fuse: str = "cross"

    def __post_init__(self):
        for name in ("search", "fuse"):
            if getattr(self, name) not in ("uni", "cross"):
                raise ValueError(f"{name} is uni or cross, not {getattr(self, name)!r}")

    def columns(self, modality: str) -> tuple[str, str]:
        """The memory's columns (`image` or `text`) that queries of `modality` search and fuse."""
        other = MODALITIES[1 - MODALITIES.index(modality)]
        searched, fused = (
            modality if choice == "uni" else other for choice in (self.search, self.fuse)
        )
        return searched, fused


@dataclasses.dataclass(frozen=True)
class RecoConfig:
    """Config of the two fusion modules and their loss.

    Attributes:
        dim: width of the embeddings.
        num_heads: divides `dim`.
        mlp_ratio: width of the MLP, as a multiple of `dim`.
        num_layers: 1 in the paper, where more layers do not help.
        norm_placement: pre | post.
        is_zero_init: both residual branches start at zero, so that step 0 is the frozen model.
        extra_skip: add the query to the output once more.
        type_embedding: a learned vector distinguishes the query from retrieved embeddings.
        loss_terms: some of `LOSS_TERMS`; without the two that contrast with frozen embeddings, refined
            embeddings may drift.
        mask_same_class: exclude examples of the same class from the negatives.
        initial_logit_scale: 1 / temperature at the start, that of the frozen model; at most 100.
    """

    dim: int
    num_heads: int = 8
    mlp_ratio: float = 4.0
    num_layers: int = 1
    norm_placement: str = "pre"
    is_zero_init: bool = True
    extra_skip: bool = False
    type_embedding: bool = False
    loss_terms: tuple[str, ...] = LOSS_TERMS
    mask_same_class: bool = True
    initial_logit_scale: float = 100.0

    def __post_init__(self):
        if self.dim < 1 or self.num_heads < 1 or self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim={self.dim}")
        if self.num_layers < 1 or self.mlp_ratio <= 0:
            raise ValueError("num_layers must be at least 1 and mlp_ratio greater than 0")
        if self.norm_placement not in ("pre", "post"):
            raise ValueError(f"norm_placement is pre or post, not {self.norm_placement!r}")
        if not self.loss_terms or not set(self.loss_terms) <= set(LOSS_TERMS):
            raise ValueError(f"loss_terms must be some of {', '.join(LOSS_TERMS)}")
        if not 0 < self.initial_logit_scale <= MAX_LOGIT_SCALE:
            raise ValueError(
                f"initial_logit_scale must be greater than 0 and at most {MAX_LOGIT_SCALE}"
            )

    @property
    def block(self) -> BlockConfig:
        """One encoder layer."""
        return BlockConfig(
            embed_dim=self.dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.dim // self.num_heads,
            mlp_dim=round(self.dim * self.mlp_ratio),
            norm="layernorm",
            mlp="gelu",
            use_bias=True,
            rope_theta=None,  # retrieved embeddings are a set: no positions
            post_norm=self.norm_placement == "post",
            output_init_std=0.0 if self.is_zero_init else None,
        )

    @classmethod
    def b32(cls) -> "RecoConfig":
        """For CLIP ViT-B/32."""
        return cls(dim=512)

    @classmethod
    def l14(cls) -> "RecoConfig":
        """For CLIP ViT-L/14."""
        return cls(dim=768)


class Fusion(nnx.Module):
    """The fusion transformer: a query and the embeddings retrieved for it, to one refined embedding."""

    def __init__(
        self,
        config: RecoConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        c = self.config = config
        self.dtype, self.remat = dtype, remat
        num_below = c.num_layers - 1
        self.stack = Stack(c.block, num_below, rngs=rngs, remat=remat) if num_below else None
        self.block = Block(c.block, rngs=rngs)
        zeros = jnp.zeros((2, c.dim), jnp.float32)
        self.types = nnx.Param(zeros, axes=(None, None)) if c.type_embedding else None

    def __call__(
        self,
        query: Float32[Array | np.ndarray, "B D"],
        retrieved: Float32[Array | np.ndarray, "B R D"],
        neighbor_mask: Bool[Array | np.ndarray, "B R"],
    ) -> Float32[Array, "B D"]:
        """Refines each query with its neighbors.

        Args:
            query: unit vectors.
            retrieved: the neighbors' embeddings, in any order.
            neighbor_mask: which neighbors exist; the values of the others are ignored.

        Returns:
            Unit vectors.
        """
        x = jnp.concatenate([query[:, None], retrieved], axis=1)
        if self.types is not None:
            types = sharding.gather(self.types[...], (None, None))
            is_query = (jnp.arange(x.shape[1]) == 0)[:, None]
            x = x + jnp.where(is_query, types[:1], types[1:])[None]
        # What the query loses by rounding is added again, so that a block that adds nothing changes nothing.
        exact, x = x[:, 0], x.astype(self.dtype)
        lost = exact - x[:, 0].astype(jnp.float32)
        mask = jnp.pad(neighbor_mask, ((0, 0), (1, 0)), constant_values=True).astype(jnp.int32)
        if self.stack is not None:
            x, _ = self.stack(x, None, lambda heads, _: (_attend(heads, mask, None), None))
        x = REMAT[self.remat](_first_output)(self.block, x, mask).astype(jnp.float32) + lost
        return _unit(x + query if self.config.extra_skip else x)


def _first_output(
    block: Block, x: Float[Array, "B T D"], mask: Int[Array, "B T"]
) -> Float[Array, "B D"]:
    """The block's output for the first token; only this one is read from the last layer."""
    inputs = x if block.post_norm else block.attention_norm(x)
    attended = block.attention.out(_attend(block.attention.heads(inputs, None), mask, 1))
    x = x[:, :1]
    x = x + (block.attention_norm(attended) if block.post_norm else attended)
    hidden = block.mlp(x if block.post_norm else block.mlp_norm(x))
    return (x + (block.mlp_norm(hidden) if block.post_norm else hidden))[:, 0]


class RECO(nnx.Module):
    """RECO: one fusion module for image queries, one for text queries, and the logit scale."""

    def __init__(
        self,
        config: RecoConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        """`dtype` is that of the activations, `remat` (a key of `REMAT`) what each layer recomputes."""
        self.config = config
        self.image_fusion = Fusion(config, rngs=rngs, dtype=dtype, remat=remat)
        self.text_fusion = Fusion(config, rngs=rngs, dtype=dtype, remat=remat)
        scale = jnp.log(jnp.float32(config.initial_logit_scale))
        self.logit_scale = nnx.Param(scale, axes=())

    def refine_image(
        self,
        query: Float32[Array | np.ndarray, "B D"],
        retrieved: Float32[Array | np.ndarray, "B R D"],
        neighbor_mask: Bool[Array | np.ndarray, "B R"],
    ) -> Float32[Array, "B D"]:
        """Refined image embeddings; arguments as for `Fusion`."""
        return self.image_fusion(query, retrieved, neighbor_mask)

    def refine_text(
        self,
        query: Float32[Array | np.ndarray, "B D"],
        retrieved: Float32[Array | np.ndarray, "B R D"],
        neighbor_mask: Bool[Array | np.ndarray, "B R"],
    ) -> Float32[Array, "B D"]:
        """Refined text embeddings; arguments as for `Fusion`."""
        return self.text_fusion(query, retrieved, neighbor_mask)


def mean_fusion(
    query: Float32[Array | np.ndarray, "B D"],
    retrieved: Float32[Array | np.ndarray, "B R D"],
    neighbor_mask: Bool[Array | np.ndarray, "B R"],
) -> Float32[Array, "B D"]:
    """Baseline without learning: the normalized mean of query and neighbors; arguments as for `Fusion`."""
    kept = jnp.where(neighbor_mask[:, :, None], retrieved, 0.0)
    return _unit(query + kept.sum(axis=1))


def loss_fn(
    model: RECO, batch: Batch, rng: Key[Array, ""], *, num_chunks: int = 1
) -> tuple[Float32[Array, ""], Metrics]:
    """Sum of the chosen terms of L = NCE(v', t') + NCE(v', t) + NCE(v, t') (docs/papers/reco.md#loss).

    v and t are frozen image and text embeddings, v' and t' refined ones; NCE is symmetric InfoNCE. The logit
    scale is used as it is; `optimizer.make_optimizer` keeps it at 100 or below.

    Args:
        model: both fusion modules.
        batch: image and text, float32 [B, D], unit vectors of the frozen towers, where image i and text i
            match; image_retrieved and text_retrieved, float32 [B, R, D]; image_neighbor_mask and
            text_neighbor_mask, bool [B, R]; class_ids, int32 [B], negative where there is no class.
        rng: unused.
        num_chunks: see `contrastive.info_nce`; no device holds the similarities of all pairs.

    Returns:
        The loss, and sums with weights: loss, each term, logit_scale, and image_moved and text_moved, the
        Euclidean distance between frozen and refined embeddings.
    """
    del rng
    c = model.config
    image, text = batch["image"], batch["text"]
    refined_image = model.refine_image(
        image, batch["image_retrieved"], batch["image_neighbor_mask"]
    )
    refined_text = model.refine_text(text, batch["text_retrieved"], batch["text_neighbor_mask"])
    pairs = {
        "refined_refined": (refined_image, refined_text),
        "refined_text": (refined_image, text),
        "image_refined": (image, refined_text),
    }
    scale = jnp.exp(model.logit_scale[...])
    class_ids = batch["class_ids"] if c.mask_same_class else None
    count = jnp.float32(image.shape[0])
    loss = jnp.zeros((), jnp.float32)
    metrics = {"logit_scale": (scale, jnp.float32(1))}
    for term in c.loss_terms:
        per_example, _ = contrastive.info_nce(*pairs[term], scale, class_ids, num_chunks)
        metrics[term] = (per_example.sum(), count)
        loss = loss + per_example.sum() / count
    for name, before, after in (
        ("image_moved", image, refined_image),
        ("text_moved", text, refined_text),
    ):
        metrics[name] = (jnp.sqrt(jnp.square(after - before).sum(-1) + 1e-12).sum(), count)
    metrics["loss"] = (loss * count, count)
    return loss, metrics


def _attend(heads: Heads, mask: jax.Array, num_queries: int | None) -> jax.Array:
    """Full attention to the tokens where `mask`, int32 [B, 1 + R], is 1; for the first queries or all."""
    q = heads.q if num_queries is None else heads.q[:, :num_queries]
    segments = jnp.ones_like(mask) if num_queries is None else mask[:, :num_queries]
    kwargs: dict[str, Any] = dict(query_segment_ids=segments, key_segment_ids=mask)
    return attention.attention(q, heads.k, heads.v, is_causal=False, **kwargs)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
