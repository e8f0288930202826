"""Losses as pure functions of logits: token cross-entropy and symmetric InfoNCE, in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.custom_vjp
def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats.

    Args:
        logits: float32 [B, T, V]; V may be split over devices.
        targets: int32 [B, T].

    Returns:
        float32 [B, T].
    """
    return _token_nll(logits, targets)[0]


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # A comparison instead of a gather: it fuses with the sum and needs no exchange when V is split.
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2) == targets[:, :, None]


def _token_nll(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.where(_is_target(logits, targets), logits, 0.0).sum(-1)
    return normalizer - chosen, (logits, targets, normalizer)


def _token_nll_grad(kept: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, None]:
    # By itself autodiff would keep the exponentials beside the logits.
    logits, targets, normalizer = kept
    probabilities = jnp.exp(logits - normalizer[:, :, None])
    is_target = _is_target(logits, targets).astype(logits.dtype)
    return grad[:, :, None] * (probabilities - is_target), None


token_nll.defvjp(_token_nll, _token_nll_grad)


def chunked_token_nll(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    num_chunks: int,
) -> jax.Array:
    """`token_nll` of `logits_fn(hidden)` whose logits exist for one run of positions at a time.

    The backward pass makes each run's logits again, so neither pass ever holds [B, T, V].

    Args:
        logits_fn: [B, t, D] -> float32 [B, t, V]; may close over parameters.
        hidden: [B, T, D].
        targets: int32 [B, T].
        num_chunks: runs of ceil(T / num_chunks) positions; 1 makes all logits at once.

    Returns:
        float32 [B, T].

    Raises:
        ValueError: num_chunks is below 1.
    """
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}, give at least 1")
    if num_chunks == 1:
        return token_nll(logits_fn(hidden), targets)
    batch, length = targets.shape
    room = -length % num_chunks
    pad = lambda x: jnp.pad(x, ((0, 0), (0, room), *((0, 0),) * (x.ndim - 2)))
    split = lambda x: jnp.moveaxis(pad(x).reshape(batch, num_chunks, -1, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(_, inputs):
        return None, token_nll(logits_fn(inputs[0]), inputs[1])

    _, nll = jax.lax.scan(chunk, None, (split(hidden), split(targets)))
    return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :length]


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
