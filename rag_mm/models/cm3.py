"""CM3 (Aghajanyan et al. 2022, arXiv 2201.07520, section 2): the causally masked language-modeling loss.

Every token-based model here uses it. Masking has already moved spans to the end of each sequence
(`rag_mm.data.masking`), so what remains is next-token cross-entropy weighted by each target's role; padding
has weight 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from rag_mm.core.roles import MAIN, RETRIEVED, SENTINEL
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.nn.decoder import Decoder
from rag_mm.ops import losses

NORMALIZE_BY = ("main", "weights")


def loss_fn(
    model: Decoder,
    batch: Batch,
    *,
    retrieved_weight: float | Float32[Array, ""],
    code_offset: int,
    sentinel_weight: float = 0.0,
    normalize_by: str = "main",
    num_chunks: int = 1,
) -> tuple[Float32[Array, ""], Metrics]:
    """Next-token loss: a weighted sum over targets, divided by their number or their weight.

    Divided by the number of main targets, the main document's share keeps its size across values of
    `retrieved_weight` (RA-CM3's alpha), so a sweep over it does not also sweep the learning rate. Divided by
    the sum of weights, the loss is a mean, whose size does not depend on the number of documents (CM3Leon).

    Args:
        model: the decoder.
        batch: tokens, targets, positions, segment_ids int32 [B, T] and roles int8 [B, T]; without
            segment_ids every sequence is one segment.
        retrieved_weight: weight of targets inside retrieved documents, >= 0.
        code_offset: targets at or above it are image codes.
        sentinel_weight: weight of targets that are sentinels, >= 0: 0 in CM3.
        normalize_by: main, the number of targets in main documents; or weights, the sum of all weights.
        num_chunks: positions are split into this many chunks, and logits computed for one at a time.

    Returns:
        The loss, and sums with their weights: loss (its weight is the divisor), main_nll, code_nll, text_nll,
        retrieved_nll (nats per target) and code_majority (share of the main image's codes with more than half
        of the probability: a lower bound on top-1 accuracy that needs no second pass over the logits).
    """
    hidden = model(batch["tokens"], batch["positions"], batch.get("segment_ids"))
    nll = losses.chunked_token_nll(model.logits, hidden, batch["targets"], num_chunks)
    roles = batch["roles"]
    main, retrieved, sentinels = (
        (roles == role).astype(jnp.float32) for role in (MAIN, RETRIEVED, SENTINEL)
    )
    weights = main + retrieved_weight * retrieved + sentinel_weight * sentinels
    divisor = {"main": main, "weights": weights}[normalize_by].sum()
    weighted = (nll * weights).sum()
    codes = jnp.where(batch["targets"] >= code_offset, main, 0.0)
    hits = (jax.lax.stop_gradient(nll) < jnp.log(2.0)).astype(jnp.float32)
    metrics = {
        "loss": (weighted, divisor),
        "main_nll": ((nll * main).sum(), main.sum()),
        "code_nll": ((nll * codes).sum(), codes.sum()),
        "text_nll": ((nll * (main - codes)).sum(), (main - codes).sum()),
        "retrieved_nll": ((nll * retrieved).sum(), retrieved.sum()),
        "code_majority": ((hits * codes).sum(), codes.sum()),
    }
    return weighted / jnp.maximum(divisor, 1.0), metrics
