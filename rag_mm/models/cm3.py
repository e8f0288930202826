"""The causal-masked objective every token-based model here shares (CM3, Aghajanyan et al. 2022, section 2).

Rows arrive with spans already moved to their ends (`rag_mm.data.masking`), so what remains is next-token
cross-entropy in which each target's role sets its weight: sentinels and padding weigh nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rag_mm.core.roles import MAIN, RETRIEVED
from rag_mm.nn.decoder import Decoder
from rag_mm.ops import losses

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def loss_fn(
    model: Decoder,
    batch: Mapping[str, jax.Array],
    *,
    retrieved_weight: float,
    code_offset: int,
    num_chunks: int = 1,
) -> tuple[jax.Array, Metrics]:
    """Weighted next-token loss, divided by the number of main-document targets.

    Dividing by main targets alone keeps the step size fixed across values of `retrieved_weight` (RA-CM3's
    alpha), so a sweep over it does not also sweep the learning rate.

    Args:
        model: the decoder.
        batch: tokens, targets, positions, segment_ids int32 [B, T] and roles int8 [B, T]; without
            segment_ids every row is one segment.
        retrieved_weight: weight of targets inside retrieved documents, >= 0.
        code_offset: targets at or above it are image codes.
        num_chunks: logits are made for one of so many runs of positions at a time.

    Returns:
        The loss, float32 [], and sums with their weights: loss, main_nll, code_nll, text_nll,
        retrieved_nll (nats per target) and code_majority (share of the main image's codes that got more than
        half of the probability, a lower bound of top-1 that needs no second pass over the logits).
    """
    hidden = model(batch["tokens"], batch["positions"], batch.get("segment_ids"))
    nll = losses.chunked_token_nll(model.logits, hidden, batch["targets"], num_chunks)
    roles = batch["roles"]
    main = (roles == MAIN).astype(jnp.float32)
    retrieved = (roles == RETRIEVED).astype(jnp.float32)
    codes = jnp.where(batch["targets"] >= code_offset, main, 0.0)
    num_main = jnp.maximum(main.sum(), 1.0)
    weighted = (nll * (main + retrieved_weight * retrieved)).sum()
    hits = (jax.lax.stop_gradient(nll) < jnp.log(2.0)).astype(jnp.float32)
    metrics = {
        "loss": (weighted, main.sum()),
        "main_nll": ((nll * main).sum(), main.sum()),
        "code_nll": ((nll * codes).sum(), codes.sum()),
        "text_nll": ((nll * (main - codes)).sum(), (main - codes).sum()),
        "retrieved_nll": ((nll * retrieved).sum(), retrieved.sum()),
        "code_majority": ((hits * codes).sum(), codes.sum()),
    }
    return weighted / num_main, metrics
