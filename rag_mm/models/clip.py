"""CLIP (Radford et al. 2021, arXiv 2103.00020): image and text encoders with one embedding space.

A ViT and a causal text transformer, trained with symmetric InfoNCE. The architecture is the published one
(pre-norm, class token, a norm before the vision stack, pooling at the end-of-text token), so the same code
serves the quickstart's small towers and public checkpoints.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from rag_mm.core import checks, sharding
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.nn import layers
from rag_mm.nn.block import BlockConfig, Heads, Stack
from rag_mm.ops import attention, contrastive

MAX_LOGIT_SCALE = 100.0  # CLIP, section 2.5


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Sizes of one transformer tower.

    Attributes:
        embed_dim: width.
        num_layers: blocks.
        num_heads: attention heads.
        mlp_dim: hidden width of the MLP.
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int

    def __post_init__(self):
        checks.at_least(self, 1, "embed_dim", "num_layers", "num_heads", "mlp_dim")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}"
            )

    def block(self, mlp: str, norm_eps: float = 1e-5) -> BlockConfig:
        """CLIP's transformer block: LayerNorm, biases everywhere, absolute positions."""
        return BlockConfig(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.embed_dim // self.num_heads,
            mlp_dim=self.mlp_dim,
            norm="layernorm",
            norm_eps=norm_eps,
            mlp=mlp,
            use_bias=True,
            rope_theta=None,
            output_init_std=self.embed_dim**-0.5 * (2 * self.num_layers) ** -0.5,
        )


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Two towers and the embedding space they share.

    Attributes:
        image_size: pixels a side.
        patch_size: pixels a side of a ViT patch.
        vision: the image tower.
        text: the text tower.
        vocab_size: text token ids.
        max_text_len: longest text, in tokens.
        end_of_text: id of the end-of-text token.
        projection_dim: width of the shared space.
        mlp: activation, quick_gelu | gelu.
        image_mean: subtracted from pixels in 0..1, by channel.
        image_std: divides them, by channel.
        initial_logit_scale: 1 / temperature at the start, at most 100; 14.3 = 1 / 0.07.
        pooling: the token whose features represent a text: first_end, the first `end_of_text`; or
            highest_id, the first occurrence of the text's highest id, as in the checkpoints of 2021.
        norm_eps: added to the variance.
    """

    image_size: int
    patch_size: int
    vision: TowerConfig
    text: TowerConfig
    vocab_size: int
    max_text_len: int
    end_of_text: int
    projection_dim: int
    mlp: str = "quick_gelu"
    image_mean: tuple[float, float, float] = (0.4815, 0.4578, 0.4082)
    image_std: tuple[float, float, float] = (0.2686, 0.2613, 0.2758)
    initial_logit_scale: float = 14.3
    pooling: str = "first_end"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.pooling not in ("first_end", "highest_id"):
            raise ValueError(f"pooling is first_end or highest_id, not {self.pooling!r}")
        checks.at_least(
            self, 1, "image_size", "patch_size", "vocab_size", "max_text_len", "projection_dim"
        )
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size is {self.patch_size}, more than {self.image_size} pixels")
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError("image_mean and image_std have one value for each of 3 channels")
        checks.at_least(self, 0, "norm_eps")
        checks.above(self, 0, "initial_logit_scale")
        checks.between(self, 0, MAX_LOGIT_SCALE, "initial_logit_scale")

    @property
    def num_patches(self) -> int:
        """Patches per image, not counting the class token."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def b32(cls) -> "CLIPConfig":
        """ViT-B/32 at 224 pixels (CLIP, table 20)."""
        return _published(TowerConfig(768, 12, 12, 3072), 512, 224, 32)

    @classmethod
    def l14(cls) -> "CLIPConfig":
        """ViT-L/14 at 224 pixels."""
        return _published(TowerConfig(1024, 24, 16, 4096), 768, 224, 14)

    @classmethod
    def l14_336(cls) -> "CLIPConfig":
        """ViT-L/14 at 336 pixels."""
        return _published(TowerConfig(1024, 24, 16, 4096), 768, 336, 14)


IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def _published(vision: TowerConfig, width: int, image_size: int, patch_size: int) -> CLIPConfig:
    return CLIPConfig(
        image_size=image_size,
        patch_size=patch_size,
        vision=vision,
        text=TowerConfig(width, 12, width // 64, 4 * width),
        vocab_size=49_408,
        max_text_len=77,
        end_of_text=49_407,
        projection_dim=width,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )


@runtime_checkable
class PatchSettings(Protocol):
    """How images become patches; see `CLIPConfig`."""

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Subtracted from pixels in 0..1, by channel."""

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Divides them, by channel."""


@runtime_checkable
class VisionSettings(PatchSettings, Protocol):
    """What a vision tower reads of a config; see `CLIPConfig`."""

    @property
    def image_size(self) -> int:
        """Pixels a side."""

    @property
    def vision(self) -> TowerConfig:
        """Sizes."""

    @property
    def mlp(self) -> str:
        """Activation."""

    @property
    def norm_eps(self) -> float:
        """Added to the variance."""

    @property
    def num_patches(self) -> int:
        """Patches of an image."""


def to_patches(images: Float[Array, "B H W 3"], config: PatchSettings) -> Float[Array, "B N P"]:
    """Normalized pixels of images in [0, 1], flat by patch, in raster order.

    Pixels that fill no patch are left out, at the right and below.
    """
    c, p = config, config.patch_size
    rows, columns = (side // p for side in images.shape[1:3])
    mean, std = (
        jnp.asarray(v, images.dtype)[None, None, None] for v in (c.image_mean, c.image_std)
    )
    x = ((images - mean) / std)[:, : rows * p, : columns * p]
    x = _reshape(x, len(x), rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5)
    return _reshape(x, len(x), rows * columns, p * p * 3)


class VisionTower(nnx.Module):
    """The ViT: images to features before the projection."""

    def __init__(
        self,
        config: VisionSettings,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        c, width = config, config.vision.embed_dim
        self.config, self.dtype = c, dtype
        self.patches = layers.Linear(
            (c.patch_size**2 * 3,), (width,), (None, "embed"), use_bias=False, rngs=rngs
        )
        self.class_embedding = layers.make_param(rngs, (width,), ("embed",), width**-0.5)
        self.position_embedding = layers.make_param(
            rngs, (c.num_patches + 1, width), (None, "embed"), 0.02
        )
        self.pre_norm = layers.Norm("layernorm", width, rngs=rngs, eps=c.norm_eps)
        block = c.vision.block(c.mlp, c.norm_eps)
        self.stack = Stack(block, c.vision.num_layers, rngs=rngs, remat=remat)
        self.post_norm = layers.Norm("layernorm", width, rngs=rngs, eps=c.norm_eps)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """The class token's features of images in [0, 1]."""
        return self.post_norm(self.tokens(images)[:, 0])

    def tokens(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """All tokens after the last block: the class token, then the patches in raster order.

        They are before `post_norm` and the projection: `last_hidden_state` of transformers.
        """
        return self.stack(self._embed(images), None, attend_to_all)[0]

    def tokens_by_layer(self, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B T D"]]:
        """All tokens after each block; the last entry is `tokens`."""
        x, found = self._embed(images), []
        for block in self.stack.unstack():
            x, _ = block(x, None, attend_to_all)
            found.append(x)
        return found

    def _embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """The class token and the patches, with their positions, before the first block."""
        x = self.patches(to_patches(images, self.config).astype(self.dtype))
        # The class token is a zero vector in front, to which its embedding is added with the positions.
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
        positions = sharding.gather(self.position_embedding[...], (None, None))
        class_vector = sharding.gather(self.class_embedding[...], (None,))
        return self.pre_norm(x + positions.at[0].add(class_vector).astype(x.dtype)[None])


class TextTower(nnx.Module):
    """The causal text transformer: tokens to features before the projection."""

    def __init__(
        self,
        config: CLIPConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        c, width = config, config.text.embed_dim
        self.config, self.dtype = c, dtype
        self.embedding = layers.Embedding(
            c.vocab_size, width, std=0.02, rngs=rngs, axes=("vocab", "embed")
        )
        self.position_embedding = layers.make_param(
            rngs, (c.max_text_len, width), (None, "embed"), 0.01
        )
        block = c.text.block(c.mlp, c.norm_eps)
        self.stack = Stack(block, c.text.num_layers, rngs=rngs, remat=remat)
        self.norm = layers.Norm("layernorm", width, rngs=rngs, eps=c.norm_eps)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
        """Features of the token that `pooling` selects; each text contains `end_of_text`."""
        x = self.tokens(tokens)
        is_highest = self.config.pooling == "highest_id"
        end = tokens.max(axis=1, keepdims=True) if is_highest else self.config.end_of_text
        ends = tokens == end
        first = (ends & (jnp.cumsum(ends, axis=1) == 1)).astype(x.dtype)
        return jnp.einsum("bt,btd->bd", first, x)

    def tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """All tokens after the last block and `norm`; each sees itself and earlier ones.

        They are before the projection: `last_hidden_state` of transformers.
        """
        positions = sharding.gather(self.position_embedding[...], (None, None))[: tokens.shape[1]]
        x = self.embedding(tokens, jnp.dtype(self.dtype)) + positions.astype(self.dtype)[None]
        return self.norm(self.stack(x, None, _attend_causally)[0])


class CLIP(nnx.Module):
    """CLIP: both towers, their projections and the logit scale."""

    def __init__(
        self,
        config: CLIPConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        """`dtype` is that of activations, `remat` (a key of `block.REMAT`) what each layer recomputes."""
        c = self.config = config
        self.vision = VisionTower(c, rngs=rngs, dtype=dtype, remat=remat)
        self.text = TextTower(c, rngs=rngs, dtype=dtype, remat=remat)
        width, out_dim = c.vision.embed_dim, c.projection_dim
        self.image_projection = layers.make_param(
            rngs, (width, out_dim), ("embed", None), width**-0.5
        )
        width = c.text.embed_dim
        self.text_projection = layers.make_param(
            rngs, (width, out_dim), ("embed", None), width**-0.5
        )
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(c.initial_logit_scale)), axes=())

    def encode_image(self, images: Float[Array, "B H W 3"]) -> Float32[Array, "B D"]:
        """Unit embeddings of images in [0, 1]; D is projection_dim."""
        return _project(self.vision(images), self.image_projection)

    def encode_text(self, tokens: Int[Array, "B T"]) -> Float32[Array, "B D"]:
        """Unit embeddings of texts; D is projection_dim."""
        return _project(self.text(tokens), self.text_projection)

    def encode_image_tokens(self, images: Float[Array, "B H W 3"]) -> Float32[Array, "B T D"]:
        """Unit embeddings of the class token, which is `encode_image`'s, and of all patches.

        For features before the last norm and the projection see `vision.tokens`.
        """
        tokens = self.vision.post_norm(self.vision.tokens(images))
        return _project(tokens, self.image_projection)

    def encode_text_tokens(self, tokens: Int[Array, "B T"]) -> Float32[Array, "B T D"]:
        """Unit embeddings of all tokens; that of the selected token is `encode_text`'s.

        For features before the projection see `text.tokens`.
        """
        return _project(self.text.tokens(tokens), self.text_projection)


def loss_fn(
    model: CLIP, batch: Batch, rng: Key[Array, ""], *, num_chunks: int = 1
) -> tuple[Float32[Array, ""], Metrics]:
    """Symmetric InfoNCE with in-batch negatives (CLIP, section 2.3 and figure 3).

    The logit scale is used as it is; `optimizer.make_optimizer` keeps it at 100 or below.

    Args:
        model: both towers.
        batch: images float32 [B, H, W, 3] in [0, 1] and tokens int32 [B, T]; image i and text i match.
        rng: unused.
        num_chunks: see `contrastive.info_nce`; no device holds the similarities of all pairs.

    Returns:
        The loss, and sums with weights: loss, in_batch_recall (recall at 1 from image to text), logit_scale.
    """
    del rng
    images, texts = model.encode_image(batch["images"]), model.encode_text(batch["tokens"])
    scale = jnp.exp(model.logit_scale[...])
    per_example, hits = contrastive.info_nce(images, texts, scale, num_chunks=num_chunks)
    count = jnp.float32(per_example.shape[0])
    metrics = {
        "loss": (per_example.sum(), count),
        "in_batch_recall": (hits.astype(jnp.float32).sum(), count),
        "logit_scale": (scale, jnp.float32(1)),
    }
    return per_example.mean(), metrics


def _reshape(x: jax.Array, *shape: int) -> jax.Array:
    spec = sharding.activation_spec("batch", *(None,) * (len(shape) - 1))
    return jax.lax.reshape(x, shape, out_sharding=spec)


def _project(features: jax.Array, projection: Any) -> jax.Array:
    kernel = sharding.gather(projection[...], (None, None))
    # Not rounded to bfloat16: similarities are multiplied by up to 100.
    x = jnp.einsum(
        "...d,de->...e",
        features,
        kernel.astype(features.dtype),
        preferred_element_type=jnp.float32,
    )
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def attend_to_all(heads: Heads, _: Any) -> tuple[jax.Array, Any]:
    """A `block.Attend` by which all tokens see each other."""
    return attention.attention(heads.q, heads.k, heads.v, is_causal=False), None


def _attend_causally(heads: Heads, _: Any) -> tuple[jax.Array, Any]:
    return attention.attention(heads.q, heads.k, heads.v, is_causal=True), None
