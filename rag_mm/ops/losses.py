"""Token cross-entropy as a pure function of logits, in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int


@jax.custom_vjp
def token_nll(
    logits: Float32[Array | np.ndarray, "B T V"], targets: Int[Array | np.ndarray, "B T"]
) -> Float32[Array, "B T"]:
    """-log softmax(logits)[target] in nats; V may be sharded."""
    return _token_nll(logits, targets)[0]


def _is_target(
    logits: Float32[Array | np.ndarray, "B T V"], targets: Int[Array | np.ndarray, "B T"]
) -> Bool[Array, "B T V"]:
    # A comparison instead of a gather: it fuses with the sum and needs no communication when V is sharded.
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2) == targets[:, :, None]


def _token_nll(
    logits: Float32[Array | np.ndarray, "B T V"], targets: Int[Array | np.ndarray, "B T"]
) -> tuple[Float32[Array, "B T"], tuple]:
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.where(_is_target(logits, targets), logits, 0.0).sum(-1)
    return normalizer - target_logits, (logits, targets, normalizer)


def _token_nll_grad(
    residuals: tuple, grad: Float32[Array, "B T"]
) -> tuple[Float32[Array, "B T V"], None]:
    # Autodiff would store the exponentials in addition to the logits.
    logits, targets, normalizer = residuals
    probabilities = jnp.exp(logits - normalizer[:, :, None])
    is_target = _is_target(logits, targets).astype(logits.dtype)
    return grad[:, :, None] * (probabilities - is_target), None


token_nll.defvjp(_token_nll, _token_nll_grad)


def chunked_token_nll(
    logits_fn: Callable[[Float[Array, "B t D"]], Float32[Array, "B t V"]],
    hidden: Float[Array | np.ndarray, "B T D"],
    targets: Int[Array | np.ndarray, "B T"],
    num_chunks: int,
) -> Float32[Array, "B T"]:
    """`token_nll(logits_fn(hidden), targets)`, with the logits of one chunk of positions at a time.

    The backward pass recomputes each chunk's logits, so neither pass ever holds [B, T, V].

    Args:
        logits_fn: may close over parameters.
        hidden: hidden states.
        targets: token ids.
        num_chunks: the chunks have ceil(T / num_chunks) positions; 1 computes all logits at once.

    Raises:
        ValueError: num_chunks is below 1.
    """
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}; give at least 1")
    if num_chunks == 1:
        return token_nll(logits_fn(hidden), targets)
    batch, length = targets.shape
    padding = -length % num_chunks
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
    split = lambda x: jnp.moveaxis(pad(x).reshape(batch, num_chunks, -1, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk(_, inputs):
        return None, token_nll(logits_fn(inputs[0]), inputs[1])

    _, nll = jax.lax.scan(chunk, None, (split(hidden), split(targets)))
    return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, :length]
