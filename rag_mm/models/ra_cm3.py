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
class Config:
    """A decoder, the weight of retrieved documents, and how many a training row holds."""

    decoder: DecoderConfig
    code_offset: int  # first image code in the shared vocabulary
    alpha: float = 0.1  # paper's best; 1.0 is CM3Leon's uniform loss


Model = Decoder


def loss_fn(
    model: Model, batch: Mapping[str, jax.Array], rng: jax.Array, *, config: Config
) -> tuple[jax.Array, cm3.Metrics]:
    """CM3's loss with retrieved targets weighted by alpha; see `cm3.loss_fn`. `rng` is unused."""
    del rng
    return cm3.loss_fn(model, batch, retrieved_weight=config.alpha, code_offset=config.code_offset)
