"""Losses as pure functions of logits: token cross-entropy and symmetric InfoNCE, in float32."""

import jax
import jax.numpy as jnp


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats.

    Args:
        logits: float32 [B, T, V]; V may be split over devices.
        targets: int32 [B, T].

    Returns:
        float32 [B, T].
    """
    # A comparison instead of a gather: it fuses with the sum and needs no exchange when V is split.
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
    chosen = jnp.where(ids == targets[:, :, None], logits, 0.0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def info_nce(similarities: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric contrastive loss (CLIP, Radford et al. 2021, figure 3).

    Args:
        similarities: float32 [B, B], already divided by the temperature; row i belongs with column i.

    Returns:
        Per-row losses float32 [B] (mean of both directions, nats) and whether the row's own column is
        its only best, bool [B].
    """
    own = jnp.diagonal(similarities)
    rows = jax.nn.logsumexp(similarities, axis=1) - own
    columns = jax.nn.logsumexp(similarities, axis=0) - own
    # Ties are no hits: a collapsed retriever finds everything alike.
    num_as_good = (similarities >= own[:, None]).sum(axis=1)
    return (rows + columns) / 2, num_as_good == 1
