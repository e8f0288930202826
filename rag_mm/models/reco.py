"""RECO (Iscen et al., ICLR 2024, arXiv 2306.07196): a frozen CLIP refined by what it finds in a memory.

An embedding looks up similar items in a memory of image-text pairs, and one light transformer layer fuses
what stands beside them into it. Numbers of sections are those of the specification that this file follows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rag_mm.core import sharding
from rag_mm.nn.block import Block, BlockConfig, Heads, Stack
from rag_mm.ops import attention, losses

MODALITIES = ("image", "text")
# Section 6: v is an image's embedding, t a text's, `refined` the same after fusion.
LOSS_TERMS = ("refined_refined", "refined_text", "image_refined")
REFINE = ("none", "image", "text", "both")
MAX_LOGIT_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What one modality's queries are compared with, and what is fused of the hits (section 4).

    `uni` is the query's own modality, `cross` the other one. RECO searches `uni` and fuses `cross`.
    """

    search: str = "uni"
    fuse: str = "cross"

    def __post_init__(self):
        for name in ("search", "fuse"):
            if getattr(self, name) not in ("uni", "cross"):
                raise ValueError(f"{name} is uni or cross, not {getattr(self, name)!r}")

    def columns(self, modality: str) -> tuple[str, str]:
        """The memory's columns that queries of `modality` search and fuse: `image` or `text`."""
        other = MODALITIES[1 - MODALITIES.index(modality)]
        searched, fused = (
            modality if kind == "uni" else other for kind in (self.search, self.fuse)
        )
        return searched, fused


@dataclasses.dataclass(frozen=True)
class RecoConfig:
    """Two fusion modules over embeddings of one width.

    Attributes:
        dim: width of the embeddings.
        num_heads: divides `dim`.
        mlp_ratio: width of the MLP in units of `dim`.
        num_layers: 1 in the paper, and deeper is not better there.
        norm_placement: pre | post, of the branches.
        is_zero_init: the branches begin at zero, so that step 0 is the frozen model.
        extra_skip: the query is added to the output once more.
        type_embedding: a learned vector tells the query from what was retrieved.
        loss_terms: some of `LOSS_TERMS`; without the two mixed ones refined vectors may drift.
        mask_same_class: pairs of the anchor's class are no negatives.
        initial_logit_scale: 1 / temperature at the start, that of the frozen model; clipped at 100.
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
            raise ValueError(f"num_heads divides dim, which {self.num_heads} and {self.dim} do not")
        if self.num_layers < 1 or self.mlp_ratio <= 0:
            raise ValueError("num_layers is at least 1 and mlp_ratio more than 0")
        if self.norm_placement not in ("pre", "post"):
            raise ValueError(f"norm_placement is pre or post, not {self.norm_placement!r}")
        if not self.loss_terms or not set(self.loss_terms) <= set(LOSS_TERMS):
            raise ValueError(f"loss_terms are some of {', '.join(LOSS_TERMS)}")
        if not 0 < self.initial_logit_scale <= MAX_LOGIT_SCALE:
            raise ValueError(f"initial_logit_scale is more than 0 and at most {MAX_LOGIT_SCALE}")

    @property
    def block(self) -> BlockConfig:
        """One encoder layer (section 5)."""
        return BlockConfig(
            embed_dim=self.dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.dim // self.num_heads,
            mlp_dim=round(self.dim * self.mlp_ratio),
            norm="layernorm",
            mlp="gelu",
            use_bias=True,
            rope_theta=None,  # what was retrieved is a set
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
    """One query and the set that was retrieved for it, to one refined vector (section 5)."""

    def __init__(self, config: RecoConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        below = c.num_layers - 1
        self.stack = Stack(c.block, below, rngs=rngs) if below else None
        self.block = Block(c.block, rngs=rngs)
        zeros = jnp.zeros((2, c.dim), jnp.float32)
        self.types = nnx.Param(zeros, axes=(None, None)) if c.type_embedding else None

    def __call__(
        self, query: jax.Array, retrieved: jax.Array, neighbor_mask: jax.Array
    ) -> jax.Array:
        """Refines.

        Args:
            query: float32 [B, D] unit rows.
            retrieved: float32 [B, R, D] in any order.
            is_there: bool [B, R]; the others do not count, whatever they hold.

        Returns:
            float32 [B, D] unit rows.
        """
        x = jnp.concatenate([query[:, None], retrieved], axis=1)
        if self.types is not None:
            kinds = sharding.gather(self.types[...], (None, None))
            first = (jnp.arange(x.shape[1]) == 0)[:, None]
            x = x + jnp.where(first, kinds[:1], kinds[1:])[None]
        present = jnp.pad(neighbor_mask, ((0, 0), (1, 0)), constant_values=True).astype(jnp.int32)
        if self.stack is not None:
            x, _ = self.stack(x, None, lambda heads, _: (_attend(heads, present, None), None))
        # Of the last layer only the query's place is read, so only that is computed.
        block = self.block
        asks = x if block.post_norm else block.attention_norm(x)
        added = block.attention.out(_attend(block.attention.heads(asks, None), present, 1))
        x = x[:, :1]
        x = x + (block.attention_norm(added) if block.post_norm else added)
        hidden = block.mlp(x if block.post_norm else block.mlp_norm(x))
        x = (x + (block.mlp_norm(hidden) if block.post_norm else hidden))[:, 0]
        return _unit(x + query if self.config.extra_skip else x)


class RECO(nnx.Module):
    """A fusion module for images, one for texts, and the temperature."""

    def __init__(self, config: RecoConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.image_fusion = Fusion(config, rngs=rngs)
        self.text_fusion = Fusion(config, rngs=rngs)
        scale = jnp.log(jnp.float32(config.initial_logit_scale))
        self.logit_scale = nnx.Param(scale, axes=())

    def refine_image(
        self, query: jax.Array, retrieved: jax.Array, neighbor_mask: jax.Array
    ) -> jax.Array:
        """An image's embeddings refined, as `Fusion`."""
        return self.image_fusion(query, retrieved, neighbor_mask)

    def refine_text(
        self, query: jax.Array, retrieved: jax.Array, neighbor_mask: jax.Array
    ) -> jax.Array:
        """A text's embeddings refined, as `Fusion`."""
        return self.text_fusion(query, retrieved, neighbor_mask)


def mean_fusion(query: jax.Array, retrieved: jax.Array, neighbor_mask: jax.Array) -> jax.Array:
    """The plain mean of a query and what was retrieved, rescaled: nothing is learned. As `Fusion`."""
    kept = jnp.where(neighbor_mask[:, :, None], retrieved, 0.0)
    return _unit(query + kept.sum(axis=1))


def loss_fn(
    model: RECO, batch: Mapping[str, jax.Array], rng: jax.Array
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """The chosen terms of L = NCE(v', t') + NCE(v', t) + NCE(v, t') (section 6).

    Args:
        model: both modules.
        batch: image and text, float32 [B, D] unit rows of the frozen towers, row i belonging with row i;
            image_retrieved and text_retrieved, float32 [B, R, D]; image_is_there and text_is_there, bool
            [B, R]; class_ids, int32 [B], where negative ids are of no class.
        rng: unused.

    Returns:
        The loss, float32 [], and sums with weights: loss, each term, logit_scale, and how far refinement
        moves: image_moved and text_moved, Euclidean.
    """
    del rng
    c = model.config
    image, text = batch["image"], batch["text"]
    refined_image = model.refine_image(image, batch["image_retrieved"], batch["image_is_there"])
    refined_text = model.refine_text(text, batch["text_retrieved"], batch["text_is_there"])
    pairs = {
        "refined_refined": (refined_image, refined_text),
        "refined_text": (refined_image, text),
        "image_refined": (image, refined_text),
    }
    scale = jnp.exp(jnp.minimum(model.logit_scale[...], jnp.log(MAX_LOGIT_SCALE)))
    is_same = _same_class(batch["class_ids"]) if c.mask_same_class else None
    count = jnp.float32(image.shape[0])
    per_row = jnp.zeros((), jnp.float32)
    metrics = {"logit_scale": (scale, jnp.float32(1))}
    for term in c.loss_terms:
        ours, _ = losses.info_nce(_similarities(*pairs[term], scale, is_same))
        metrics[term] = (ours.sum(), count)
        per_row = per_row + ours.sum() / count
    for name, before, after in (
        ("image_moved", image, refined_image),
        ("text_moved", text, refined_text),
    ):
        metrics[name] = (jnp.sqrt(jnp.square(after - before).sum(-1) + 1e-12).sum(), count)
    metrics["loss"] = (per_row * count, count)
    return per_row, metrics


def _same_class(class_ids: jax.Array) -> jax.Array:
    """Pairs of two different rows of one class, bool [B, B]."""
    ids = sharding.place(class_ids, None)
    is_own = jnp.eye(len(ids), dtype=bool)
    return (ids[:, None] == ids[None, :]) & (ids >= 0)[:, None] & ~is_own


def _similarities(
    left: jax.Array, right: jax.Array, scale: jax.Array, is_same: jax.Array | None
) -> jax.Array:
    whole = sharding.place(right, None, None)
    products = sharding.place(jnp.einsum("id,jd->ij", left, whole), None, None)
    found = scale * products
    return found if is_same is None else jnp.where(is_same, -jnp.inf, found)


def _attend(heads: Heads, present: jax.Array, num_queries: int | None) -> jax.Array:
    """Every query attends to the places that are there; the first `num_queries` of them only."""
    q = heads.q if num_queries is None else heads.q[:, :num_queries]
    segments = jnp.ones_like(present) if num_queries is None else present[:, :num_queries]
    kinds: dict[str, Any] = dict(query_segment_ids=segments, key_segment_ids=present)
    return attention.attention(q, heads.k, heads.v, is_causal=False, **kinds)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
