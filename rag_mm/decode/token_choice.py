"""One step's token, from the logits of all streams: combine, restrict, temperature, top-p, sample."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from rag_mm.core import sharding

Combine = Callable[[Float32[Array, "S B V"]], Float32[Array, "B V"]]


class Choice(NamedTuple):
    """The token of one step, one per example, and its log-probabilities in nats.

    Attributes:
        token: ids.
        log_prob: under the combined logits restricted to the allowed tokens.
        sampled_log_prob: under what it was sampled from, after temperature and top-p; 0 if greedy.
        stream_log_probs: under the unmodified model of each stream, over all tokens; None without `combine`.
    """

    token: Int32[Array, " B"]
    log_prob: Float32[Array, " B"]
    sampled_log_prob: Float32[Array, " B"]
    stream_log_probs: Float32[Array, "B S"] | None


def choose(
    logits: Float32[Array, "S B V"],
    keys: Array,
    allowed: Bool[Array, "#B V"],
    *,
    combine: Combine | None,
    temperature: Float32[Array, ""] | None,
    top_p: Float32[Array, ""] | None,
) -> Choice:
    """Samples one token per example.

    Args:
        logits: of every stream.
        keys: a typed PRNG key per example.
        allowed: tokens that may be sampled, at least one per example. Where `combine` leaves no finite logit
            among them, all of them are equally likely.
        combine: logits of all streams to those to sample from; None for a single stream.
        temperature: None is greedy.
        top_p: None keeps all tokens.
    """
    if combine is None:
        combined = jnp.where(allowed, logits[0], -jnp.inf)
    else:
        combined = combine(logits)
        combined = jnp.where(allowed & jnp.isfinite(combined), combined, -jnp.inf)
        is_stuck = (combined == -jnp.inf).all(axis=1, keepdims=True)
        combined = jnp.where(is_stuck & allowed, jnp.float32(0), combined)
    if temperature is None:
        token = jnp.argmax(combined, axis=-1).astype(jnp.int32)
    else:
        scaled = combined / temperature
        if top_p is not None:
            scaled = jnp.where(_nucleus(scaled, top_p), scaled, -jnp.inf)
        token = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    # A comparison, not a gather: the batch may be split over devices.
    is_chosen = jnp.arange(combined.shape[1], dtype=jnp.int32)[None] == token[:, None]

    def log_prob(scores: jax.Array) -> jax.Array:
        mask = is_chosen if scores.ndim == 2 else is_chosen[None]
        return jnp.where(mask, jax.nn.log_softmax(scores), 0).sum(axis=-1)

    sampled = jnp.zeros_like(log_prob(combined)) if temperature is None else log_prob(scaled)
    of_streams = None if combine is None else log_prob(logits).T
    return Choice(token, log_prob(combined), sampled, of_streams)


def allowed_at(
    allowed: Bool[Array, "..."] | Callable[[Array], Array], step: Int32[Array, ""]
) -> Bool[Array, "#B V"]:
    """The mask of a step, from one mask [V], one per step [T, V], or a function of the step."""
    if callable(allowed):
        allowed = allowed(step)
        return allowed[None] if allowed.ndim == 1 else sharding.place(allowed, "batch", None)
    if allowed.ndim == 1:
        return allowed[None]
    return jax.lax.dynamic_index_in_dim(allowed, step, keepdims=True, axis=0)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest set of tokens whose probability reaches top_p, and ties with its last: bool [B, V]."""
    probs = jax.nn.softmax(logits)
    descending = -jnp.sort(-probs, axis=-1)
    # Probability before each rank: the token that crosses the threshold is still in the set.
    before = jnp.cumsum(descending, axis=-1) - descending
    lowest = jnp.where(before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return probs >= lowest


def split_streams(logits: Float32[Array, "R V"], num_streams: int) -> Float32[Array, "S B V"]:
    """Logits of rows, an example's streams next to each other, by stream; all of a row on one device."""
    # Sorting and sampling need all of an example's logits.
    logits = sharding.place(logits, "batch", None)
    if num_streams == 1:
        return logits[None]
    shape = (logits.shape[0] // num_streams, num_streams, logits.shape[1])
    layout = sharding.activation_spec("batch", None, None)
    return jnp.moveaxis(jax.lax.reshape(logits, shape, out_sharding=layout), 1, 0)


def join_streams(streams: tuple[Array, ...]) -> Array:
    """Arrays [B, ...] of all streams as rows [B * S, ...], an example's streams next to each other.

    The examples then keep their devices, however many streams there are.
    """
    if len(streams) == 1:
        return streams[0]
    stacked = jnp.stack(streams, axis=1)
    shape = (stacked.shape[0] * len(streams), *stacked.shape[2:])
    layout = sharding.activation_spec("batch", *(None,) * (len(shape) - 1))
    return jax.lax.reshape(stacked, shape, out_sharding=layout)
