"""One step's token, from the logits of all streams: combine, restrict, temperature, top-p, sample."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from rag_mm.core import sharding

Combine = Callable[[Float32[Array, "S B V"], Bool[Array, "#B V"]], Float32[Array, "B V"]]
"""The logits of all streams and which tokens are allowed -> logits to sample from, every row on its own."""


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


class Scores(NamedTuple):
    """What one step's token is sampled from, as logits; -inf for tokens that cannot be sampled.

    Attributes:
        combined: the combined logits restricted to the allowed tokens.
        sampled: after temperature and top-p; None if greedy.
    """

    combined: Float32[Array, "B V"]
    sampled: Float32[Array, "B V"] | None


def choose(
    logits: Float32[Array, "S B V"],
    keys: Array,
    allowed: Bool[Array, "#B V"],
    *,
    combine: Combine | None,
    temperature: Float32[Array, ""] | None,
    top_p: Float32[Array, ""] | None,
) -> Choice:
    """Samples one token per example, with a typed PRNG key each; other arguments as for `score`."""
    scores = score(logits, allowed, combine=combine, temperature=temperature, top_p=top_p)
    if scores.sampled is None:
        token = jnp.argmax(scores.combined, axis=-1).astype(jnp.int32)
    else:
        token = jax.vmap(jax.random.categorical)(keys, scores.sampled).astype(jnp.int32)
    return record(token, scores, None if combine is None else logits)


def score(
    logits: Float32[Array, "S B V"],
    allowed: Bool[Array, "#B V"],
    *,
    combine: Combine | None,
    temperature: Float32[Array, ""] | None,
    top_p: Float32[Array, ""] | None,
) -> Scores:
    """Combines, restricts, divides by the temperature, keeps the nucleus.

    Args:
        logits: of every stream.
        allowed: tokens that may be sampled, at least one per example. Where `combine` leaves no finite logit
            among them, all of them are equally likely.
        combine: logits of all streams to those to sample from; None for a single stream.
        temperature: None is greedy.
        top_p: None keeps all tokens.
    """
    if combine is None:
        combined = jnp.where(allowed, logits[0], -jnp.inf)
    else:
        combined = combine(logits, allowed)
        combined = jnp.where(allowed & jnp.isfinite(combined), combined, -jnp.inf)
        is_stuck = (combined == -jnp.inf).all(axis=1, keepdims=True)
        combined = jnp.where(is_stuck & allowed, jnp.float32(0), combined)
    if temperature is None:
        return Scores(combined, None)
    scaled = combined / temperature
    if top_p is not None:
        scaled = jnp.where(_nucleus(scaled, top_p), scaled, -jnp.inf)
    return Scores(combined, scaled)


def record(
    token: Int32[Array, " B"], scores: Scores, logits: Float32[Array, "S B V"] | None
) -> Choice:
    """A step's token with its log-probabilities; `logits` are those of the streams, or None."""
    is_chosen = is_token(token, scores.combined.shape[1])

    def log_prob(scores: jax.Array) -> jax.Array:
        mask = is_chosen if scores.ndim == 2 else is_chosen[None]
        return jnp.where(mask, jax.nn.log_softmax(scores), 0).sum(axis=-1)

    of_combined = log_prob(scores.combined)
    sampled = jnp.zeros_like(of_combined) if scores.sampled is None else log_prob(scores.sampled)
    return Choice(token, of_combined, sampled, None if logits is None else log_prob(logits).T)


def is_token(tokens: Int32[Array, "*T"], vocab_size: int) -> Bool[Array, "*T V"]:
    """True at each token's own id; a comparison, not a gather: the batch may be split over devices."""
    ids = jnp.arange(vocab_size, dtype=jnp.int32).reshape((1,) * tokens.ndim + (vocab_size,))
    return ids == tokens[..., None]


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


def split_streams(logits: Float32[Array, "R *T V"], num_streams: int) -> Float32[Array, "S B *T V"]:
    """Logits of rows, an example's streams next to each other, by stream; all of a row on one device."""
    # Sorting and sampling need all of an example's logits.
    rest = (None,) * (logits.ndim - 1)
    logits = sharding.place(logits, "batch", *rest)
    if num_streams == 1:
        return logits[None]
    shape = (logits.shape[0] // num_streams, num_streams, *logits.shape[1:])
    layout = sharding.activation_spec("batch", None, *rest)
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
