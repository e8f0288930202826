"""SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786): image and text encoders with one embedding space.

Against CLIP, a pair is judged by itself: sigmoid(scale * cosine + bias) is the probability that an image and
a text match (SigLIP, Zhai et al. 2023, arXiv 2303.15343, section 3.2). The ViT has no class token; a learned
query reads its patches (attention pooling, "MAP head"). Tokens of a text see each other, and the last one,
mostly padding, stands for the text.

The NaFlex models (Tschannen et al. 2025, section 2.4.2) take images of any aspect ratio: their positions are
those of a square grid, interpolated to the image's.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from rag_mm.core import checks, sharding
from rag_mm.models.clip import TowerConfig, attend_to_all, to_patches
from rag_mm.nn import layers
from rag_mm.nn.block import MLP, BlockConfig, Stack
from rag_mm.ops import attention

MLP_ACTIVATION = "gelu_tanh"
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class SigLIP2Config:
    """Two towers and the embedding space they share, which is as wide as the image tower.

    Attributes:
        image_size: pixels a side of a square image.
        patch_size: pixels a side of a patch.
        vision: the image tower.
        text: the text tower.
        vocab_size: text token ids.
        padding: id that fills texts up.
        max_text_len: tokens of every text, with padding.
        any_aspect: whether images of other grids than the square one are taken (NaFlex).
        resample: filter that scales images, bilinear | bicubic.
        image_mean: subtracted from pixels in 0..1, by channel.
        image_std: divides them, by channel.
        initial_logit_scale: 1 / temperature at the start.
        initial_logit_bias: added to logits at the start.
        norm_eps: added to the variance.
    """

    image_size: int
    patch_size: int
    vision: TowerConfig
    text: TowerConfig
    vocab_size: int
    padding: int = 0
    max_text_len: int = 64
    any_aspect: bool = False
    resample: str = "bilinear"
    image_mean: tuple[float, float, float] = HALF
    image_std: tuple[float, float, float] = HALF
    initial_logit_scale: float = 10.0
    initial_logit_bias: float = -10.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        checks.at_least(self, 1, "image_size", "patch_size", "vocab_size", "max_text_len")
        checks.at_least(self, 0, "norm_eps", "padding")
        checks.above(self, 0, "initial_logit_scale")
        checks.one_of(self, "resample", ("bilinear", "bicubic"))
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size is {self.patch_size}, more than {self.image_size} pixels")
        if self.padding >= self.vocab_size:
            raise ValueError(f"padding is {self.padding}, but there are {self.vocab_size} ids")
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError("image_mean and image_std have one value for each of 3 channels")

    @property
    def grid(self) -> int:
        """Patches a side of a square image; pixels that fill no patch are left out at the right and below."""
        return self.image_size // self.patch_size

    @property
    def projection_dim(self) -> int:
        """Width of the shared space."""
        return self.vision.embed_dim

    @classmethod
    def base(cls, image_size: int = 224, patch_size: int = 16) -> "SigLIP2Config":
        """ViT-B; published with patches of 16 at 224 to 512 pixels and of 32 at 256."""
        return _published(TowerConfig(768, 12, 12, 3072), image_size, patch_size)

    @classmethod
    def large(cls, image_size: int = 256) -> "SigLIP2Config":
        """ViT-L/16 at 256 to 512 pixels."""
        return _published(TowerConfig(1024, 24, 16, 4096), image_size, 16)

    @classmethod
    def so400m(cls, image_size: int = 224, patch_size: int = 14) -> "SigLIP2Config":
        """ViT-So400m; published with patches of 14 at 224 and 384 pixels and of 16 at 256 to 512."""
        return _published(TowerConfig(1152, 27, 16, 4304), image_size, patch_size)


def _published(tower: TowerConfig, image_size: int, patch_size: int) -> SigLIP2Config:
    return SigLIP2Config(image_size, patch_size, tower, tower, vocab_size=256_000)


class AttentionPooling(nnx.Module):
    """A learned query's attention to all tokens, and an MLP behind it (SigLIP's "MAP head")."""

    def __init__(self, block: BlockConfig, *, rngs: nnx.Rngs):
        width, heads = block.embed_dim, (block.num_heads, block.head_dim)
        self.query = layers.make_param(rngs, (1, 1, width), (None, None, "embed"), width**-0.5)
        self.qkv = layers.Linear(
            (width,), (3, *heads), ("embed", None, "heads", None), use_bias=True, rngs=rngs
        )
        self.out = layers.Linear(
            heads, (width,), ("heads", None, "embed"), use_bias=True, rngs=rngs
        )
        self.norm = layers.Norm("layernorm", width, rngs=rngs, eps=block.norm_eps)
        self.mlp = MLP(block, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """One vector for the tokens of each image."""
        query = sharding.gather(self.query[...], (None,) * 3)[0, 0].astype(tokens.dtype)
        first = jnp.pad(tokens, ((0, 0), (1, 0), (0, 0))).at[:, 0].set(query)
        heads = self.qkv(first)
        q, k, v = heads[:, :1, 0], heads[:, 1:, 1], heads[:, 1:, 2]
        read = self.out(attention.attention(q, k, v, is_causal=False))
        return (read + self.mlp(self.norm(read)))[:, 0]


class PatchTower(nnx.Module):
    """The ViT without a class token: images to pooled features."""

    def __init__(
        self,
        config: SigLIP2Config,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        c, width = config, config.vision.embed_dim
        self.config, self.dtype = c, dtype
        self.patches = layers.Linear(
            (c.patch_size**2 * 3,), (width,), (None, "embed"), use_bias=True, rngs=rngs
        )
        self.position_embedding = layers.make_param(
            rngs, (c.grid**2, width), (None, "embed"), width**-0.5
        )
        block = c.vision.block(MLP_ACTIVATION, c.norm_eps)
        self.stack = Stack(block, c.vision.num_layers, rngs=rngs, remat=remat)
        self.post_norm = layers.Norm("layernorm", width, rngs=rngs, eps=c.norm_eps)
        self.head = AttentionPooling(block, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Features of images in [0, 1]: square ones or, with `any_aspect`, of any whole number of patches."""
        return self.head(self.post_norm(self.tokens(images)))

    def tokens(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """All patches after the last block, in raster order; they are before `post_norm`."""
        rows, columns = (side // self.config.patch_size for side in images.shape[1:3])
        x = self.patches(to_patches(images, self.config).astype(self.dtype))
        x = x + self._positions(rows, columns).astype(x.dtype)[None]
        return self.stack(x, None, attend_to_all)[0]

    def _positions(self, rows: int, columns: int) -> Float[Array, "N D"]:
        table, side = sharding.gather(self.position_embedding[...], (None, None)), self.config.grid
        if (rows, columns) == (side, side):
            return table
        if not self.config.any_aspect:
            raise ValueError(
                f"images have {rows} x {columns} patches, but the model {side} x {side}"
            )
        width = table.shape[-1]
        square = table.astype(jnp.float32).reshape(side, side, width)
        resized = jax.image.resize(square, (rows, columns, width), "linear", antialias=True)
        return resized.reshape(rows * columns, width)


class TokenTower(nnx.Module):
    """The text transformer, in which all tokens see each other: tokens to embeddings."""

    def __init__(
        self,
        config: SigLIP2Config,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        c, width = config, config.text.embed_dim
        self.dtype = dtype
        self.embedding = layers.Embedding(
            c.vocab_size, width, std=width**-0.5, rngs=rngs, axes=("vocab", "embed")
        )
        self.position_embedding = layers.make_param(
            rngs, (c.max_text_len, width), (None, "embed"), 0.02
        )
        block = c.text.block(MLP_ACTIVATION, c.norm_eps)
        self.stack = Stack(block, c.text.num_layers, rngs=rngs, remat=remat)
        self.norm = layers.Norm("layernorm", width, rngs=rngs, eps=c.norm_eps)
        self.head = layers.Linear(
            (width,), (c.projection_dim,), ("embed", None), use_bias=True, rngs=rngs
        )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B D"]:
        """Features of the last token, in the shared space."""
        return self.head(self.tokens(tokens)[:, -1:])[:, 0]

    def tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """All tokens after the last block and `norm`."""
        positions = sharding.gather(self.position_embedding[...], (None, None))[: tokens.shape[1]]
        x = self.embedding(tokens, jnp.dtype(self.dtype)) + positions.astype(self.dtype)[None]
        return self.norm(self.stack(x, None, attend_to_all)[0])


class SigLIP2(nnx.Module):
    """SigLIP 2: both towers, and the scale and bias of the sigmoid."""

    def __init__(
        self,
        config: SigLIP2Config,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        """`dtype` is that of activations, `remat` (a key of `block.REMAT`) what each layer recomputes."""
        c = self.config = config
        self.vision = PatchTower(c, rngs=rngs, dtype=dtype, remat=remat)
        self.text = TokenTower(c, rngs=rngs, dtype=dtype, remat=remat)
        scale, bias = math.log(c.initial_logit_scale), c.initial_logit_bias
        self.logit_scale = nnx.Param(jnp.full(1, scale, jnp.float32), axes=(None,))
        self.logit_bias = nnx.Param(jnp.full(1, bias, jnp.float32), axes=(None,))

    def encode_image(self, images: Float[Array, "B H W 3"]) -> Float32[Array, "B D"]:
        """Unit embeddings of images in [0, 1]; D is projection_dim."""
        return _unit(self.vision(images))

    def encode_text(self, tokens: Int[Array, "B T"]) -> Float32[Array, "B D"]:
        """Unit embeddings of texts; D is projection_dim."""
        return _unit(self.text(tokens))

    def match(
        self, images: Float32[Array, "B D"], texts: Float32[Array, "C D"]
    ) -> Float32[Array, "B C"]:
        """The probability that each image and each text match, of unit embeddings."""
        scale, bias = (
            each[...].astype(jnp.float32)[None] for each in (self.logit_scale, self.logit_bias)
        )
        return jax.nn.sigmoid(jnp.exp(scale) * (images @ texts.T) + bias)


def _unit(features: Float[Array, "B D"]) -> Float32[Array, "B D"]:
    x = features.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
