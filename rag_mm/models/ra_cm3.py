"""RA-CM3 (Yasunaga et al., ICML 2023): CM3 with retrieved documents before the main one.

Retrieval itself lies outside the model: documents are put into the row on the host, from precomputed
neighbors, so a training step stays pure. What the paper adds to CM3's loss is one number (its equation 3):

    L = -log p(x | m_1..m_K) - alpha * log p(m_1..m_K)
"""

import dataclasses
from collections.abc import Mapping

import jax

from rag_mm.models import cm3
from rag_mm.nn.decoder import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True)
class RACM3Config:
    """A decoder, the weight of retrieved documents, and how many a training row holds."""

    decoder: DecoderConfig
    code_offset: int  # first image code in the shared vocabulary
    alpha: float = 0.1  # paper's best; 1.0 is CM3Leon's uniform loss
    loss_chunks: int = 1  # runs of positions whose logits are made one after the other

    @classmethod
    def tiny(cls) -> "RACM3Config":
        """Two layers of the family, for tests and a first look."""
        return cls(_family(512, 2, 64, 4, 128, "float32"), 384)

    @classmethod
    def b2_7(cls) -> "RACM3Config":
        """The paper's 2.7 B; its shape is CM3-Medium's (CM3 appendix A.1), which the paper builds on.

        Our vocabulary: GPT-2's 50,257 words, which CM3 reads, room for specials, and 8,192 codes.
        """
        return cls(_family(58_880, 32, 2560, 32, 4096, "bfloat16"), 58_880 - 8_192)


def _family(
    vocab_size: int, num_layers: int, embed_dim: int, num_heads: int, max_seq_len: int, dtype: str
) -> DecoderConfig:
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
        init_std=0.006,
        dtype=dtype,
    )


Model = Decoder


def loss_fn(
    model: Model, batch: Mapping[str, jax.Array], rng: jax.Array, *, config: RACM3Config
) -> tuple[jax.Array, cm3.Metrics]:
    """CM3's loss with retrieved targets weighted by alpha; see `cm3.loss_fn`. `rng` is unused."""
    del rng
    return cm3.loss_fn(
        model,
        batch,
        retrieved_weight=config.alpha,
        code_offset=config.code_offset,
        num_chunks=config.loss_chunks,
    )
