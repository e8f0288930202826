"""Sizes and options of Emu (Sun et al., ICLR 2024, arXiv 2307.05222)."""

import dataclasses

from rag_mm.core import checks, image_slots
from rag_mm.models import clip, llama
from rag_mm.nn.decoder import DecoderConfig

KINDS = ("cformer", "standardised", "pca")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image tower whose tokens Emu reads; the defaults are EVA-CLIP's g/14.

    Attributes:
        image_size: pixels a side.
        patch_size: pixels a side of a patch.
        vision: sizes of the tower.
        mlp: activation, gelu | quick_gelu.
        norm_eps: added to the variance.
        is_eva: whether the tower is EVA's: no norm before the first block, a bias of the patches' linear map
            and none of keys; False: CLIP's.
        image_mean: subtracted from pixels in 0..1, by channel.
        image_std: divides them, by channel.
    """

    image_size: int = 224
    patch_size: int = 14
    vision: clip.TowerConfig = dataclasses.field(
        default_factory=lambda: clip.TowerConfig(1408, 40, 16, 6144)
    )
    mlp: str = "gelu"
    norm_eps: float = 1e-6
    is_eva: bool = True
    image_mean: tuple[float, float, float] = clip.IMAGE_MEAN
    image_std: tuple[float, float, float] = clip.IMAGE_STD

    def __post_init__(self):
        checks.at_least(self, 1, "image_size", "patch_size")
        checks.at_least(self, 0, "norm_eps")
        checks.one_of(self, "mlp", ("gelu", "quick_gelu"))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}"
            )

    @property
    def num_patches(self) -> int:
        """Patches of an image, not counting the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: the class token and the patches."""
        return self.num_patches + 1

    @classmethod
    def of_clip(cls, config: clip.CLIPConfig) -> "VisionConfig":
        """The image tower of a CLIP."""
        return cls(
            image_size=config.image_size,
            patch_size=config.patch_size,
            vision=config.vision,
            mlp=config.mlp,
            norm_eps=config.norm_eps,
            is_eva=False,
            image_mean=config.image_mean,
            image_std=config.image_std,
        )


@dataclasses.dataclass(frozen=True)
class CFormerConfig:
    """Sizes of the causal transformer between vision tokens and decoder; the defaults are Emu's.

    Attributes:
        num_queries: learned queries, one for each vector that an image becomes.
        num_layers: blocks.
        embed_dim: width.
        num_heads: heads of both attentions.
        head_dim: width of a head.
        mlp_dim: hidden width of the MLP.
        is_causal: whether a query sees earlier queries only; False: all, as in BLIP-2.
        num_buckets: buckets of relative positions.
        max_distance: distance from which all are in the last bucket.
        norm_eps: added to the mean square.
        query_std: standard deviation of initial queries.
    """

    num_queries: int = 32
    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    head_dim: int = 64
    mlp_dim: int = 3072
    is_causal: bool = True
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    query_std: float = 0.02

    def __post_init__(self):
        sizes = ("num_queries", "num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim")
        checks.at_least(self, 1, *sizes)
        checks.at_least(self, 4, "num_buckets")
        checks.at_least(self, 0, "norm_eps", "query_std")
        checks.above(self, self.num_buckets // 2, "max_distance")


@dataclasses.dataclass(frozen=True)
class TargetsConfig:
    """What the regression head predicts; the defaults are the paper's. The rest is what small models need.

    Attributes:
        kind: cformer, the C-Former's outputs, detached (the paper); standardised, the same minus their mean
            and divided by their standard deviation by slot and dimension; or pca, frozen principal components
            of groups of 2x2 patch tokens, without a C-Former.
        pca_dim: components of a group, for pca.
        anchor_weight: weight of the error of a linear map from an image's vectors to its vision tokens,
            which keeps the vectors from collapsing; 0: there is no such map.
        has_positions: whether a learned table is added to the vision tokens that the C-Former reads.
        has_class_slot: whether the class token has a slot of its own, the first.
        standardises_tokens: whether the tower's tokens are standardised by position and dimension, with
            statistics of training images (`image_codes.fit_statistics`), before all else.
    """

    kind: str = "cformer"
    pca_dim: int = 128
    anchor_weight: float = 0.0
    has_positions: bool = False
    has_class_slot: bool = False
    standardises_tokens: bool = False

    def __post_init__(self):
        checks.one_of(self, "kind", KINDS)
        checks.at_least(self, 1, "pca_dim")
        checks.at_least(self, 0, "anchor_weight")
        if self.kind == "pca" and (self.anchor_weight or self.has_positions):
            raise ValueError(
                "targets of kind pca have no C-Former: leave out anchor_weight and has_positions"
            )


@dataclasses.dataclass(frozen=True)
class EmuConfig:
    """Sizes of an Emu, and how its losses count.

    Attributes:
        decoder: the language model's.
        ids: the special tokens.
        vision: the image tower whose tokens are read.
        has_tower: whether the tower is a part of the model; False: batches hold the tokens of a frozen one.
        cformer: sizes of the causal transformer; not used by targets of kind pca.
        targets: what the regression head predicts.
        image_loss_weight: weight of the regression beside the cross-entropy of text.
        retrieved_weight: weight of text in retrieved documents; 1 as in the paper, which weights all alike.
        loss_chunks: chunks of positions whose logits are computed one after the other.
    """

    decoder: DecoderConfig
    ids: image_slots.SlotTokens = dataclasses.field(default_factory=image_slots.SlotTokens)
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    has_tower: bool = True
    cformer: CFormerConfig = dataclasses.field(default_factory=CFormerConfig)
    targets: TargetsConfig = dataclasses.field(default_factory=TargetsConfig)
    image_loss_weight: float = 1.0
    retrieved_weight: float = 1.0
    loss_chunks: int = 1

    def __post_init__(self):
        checks.at_least(self, 0, "image_loss_weight", "retrieved_weight")
        checks.at_least(self, 1, "loss_chunks")
        largest, size = max(vars(self.ids).values()), self.decoder.vocab_size
        if largest >= size:
            raise ValueError(f"the special token {largest} is outside a vocabulary of {size}")
        side = round(self.vision.num_patches**0.5)
        if self.targets.kind == "pca" and side % 2:
            raise ValueError(
                f"targets of kind pca need an even number of patches a side, not {side}"
            )

    @property
    def num_slots(self) -> int:
        """N: vectors, and slots, of an image."""
        is_pca = self.targets.kind == "pca"
        num = self.vision.num_patches // 4 if is_pca else self.cformer.num_queries
        return num + self.targets.has_class_slot

    @property
    def code_dim(self) -> int:
        """R: width of an image's codes, which the regression head predicts: the decoder's, except for pca."""
        return self.targets.pca_dim if self.targets.kind == "pca" else self.decoder.embed_dim

    @classmethod
    def tiny(cls) -> "EmuConfig":
        """Two layers, for tests and a first look; its tower is a CLIP's of 4x4 patches."""
        tower = clip.TowerConfig(16, 1, 2, 32)
        return cls(
            DecoderConfig(
                vocab_size=64,
                num_layers=2,
                embed_dim=16,
                num_heads=2,
                mlp_dim=32,
                max_seq_len=64,
                norm_eps=1e-6,
            ),
            ids=image_slots.SlotTokens(1, 2, 60, 61, 62, 63),
            vision=VisionConfig(16, 4, tower, "quick_gelu", 1e-5, is_eva=False),
            cformer=CFormerConfig(3, 2, 16, 2, 8, 32, num_buckets=8, max_distance=16),
        )

    @classmethod
    def b7(cls) -> "EmuConfig":
        """On LLaMA 7B: the model of the paper's ablation."""
        return cls(_extended(llama.llama_7b()))

    @classmethod
    def b14(cls) -> "EmuConfig":
        """The paper's model on LLaMA 13B, 14B parameters with tower and C-Former."""
        return cls(_extended(llama.llama_13b()))


def _extended(decoder: DecoderConfig) -> DecoderConfig:
    vocab_size = decoder.vocab_size + 4  # [PAD], [IMG], [/IMG] and <image>.
    return dataclasses.replace(decoder, vocab_size=vocab_size, dtype="bfloat16", remat="full")
