"""RA-CM3 (Yasunaga et al., ICML 2023, arXiv 2211.12561): CM3 with retrieved documents before the main one.

Retrieval happens outside the model: the host puts documents into the sequence, from precomputed neighbors, so
a training step stays pure. The paper adds one number, alpha, to CM3's loss:

    L = -log p(x | m_1..m_K) - alpha * log p(m_1..m_K)

See docs/papers/ra_cm3.md.
"""

import dataclasses

from jaxtyping import Array, Float32, Key

from rag_mm.core import checks
from rag_mm.models import cm3
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.nn.decoder import Decoder, DecoderConfig, InitConfig


@dataclasses.dataclass(frozen=True)
class RACM3Config:
    """A decoder, its image codes, and how targets count in the loss.

    Attributes:
        decoder: sizes and family.
        code_offset: first image code in the shared vocabulary.
        alpha: weight of the targets in retrieved documents; 0.1 is the paper's best, 1.0 CM3Leon's.
        loss_chunks: chunks of positions whose logits are computed one after the other.
        sentinel_weight: weight of the targets that are sentinels; 0 as in CM3, 1 in CM3Leon.
        normalize_by: what the weighted sum is divided by: main, the number of targets in main documents; or
            weights, the sum of all weights (CM3Leon).
    """

    decoder: DecoderConfig
    code_offset: int
    alpha: float = 0.1
    loss_chunks: int = 1
    sentinel_weight: float = 0.0
    normalize_by: str = "main"

    def __post_init__(self):
        checks.at_least(self, 0, "alpha", "sentinel_weight")
        checks.one_of(self, "normalize_by", cm3.NORMALIZE_BY)

    @classmethod
    def tiny(cls) -> "RACM3Config":
        """Two layers, for tests and a first look."""
        return cls(_family(512, 2, 64, 4, 128, "float32"), 384)

    @classmethod
    def b2_7(cls) -> "RACM3Config":
        """The paper's 2.7B model; its shape is that of CM3-Medium (CM3, appendix A.1), on which it builds.

        Our vocabulary: GPT-2's 50,257 tokens, which CM3 uses, room for special tokens, and 8,192 codes.
        """
        return cls(_family(58_880, 32, 2560, 32, 4096, "bfloat16"), 58_880 - 8_192)


def _family(
    vocab_size: int, num_layers: int, embed_dim: int, num_heads: int, max_seq_len: int, dtype: str
) -> DecoderConfig:
    # As the sinusoids, fairseq's recipe: token vectors of variance 1 next to them, and Xavier initialization
    # without scaling by depth. The value is that of the MLP, which holds most of the weights.
    xavier = (2 / (embed_dim + 4 * embed_dim)) ** 0.5
    return DecoderConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_dim=4 * embed_dim,
        max_seq_len=max_seq_len,
        norm="layernorm",
        positions="sinusoidal",
        mlp="relu",
        use_bias=True,
        tie_embeddings=True,
        scale_embeddings=True,
        init=InitConfig(std=xavier, output_std=xavier, embedding_std=embed_dim**-0.5),
        dtype=dtype,
    )


Model = Decoder


def loss_fn(
    model: Model, batch: Batch, rng: Key[Array, ""], *, config: RACM3Config
) -> tuple[Float32[Array, ""], Metrics]:
    """CM3's loss with the weights of `config`; see `cm3.loss_fn`. `rng` is unused."""
    del rng
    return cm3.loss_fn(
        model,
        batch,
        retrieved_weight=config.alpha,
        code_offset=config.code_offset,
        sentinel_weight=config.sentinel_weight,
        normalize_by=config.normalize_by,
        num_chunks=config.loss_chunks,
    )
