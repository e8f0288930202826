"""Sampling from a decoder: one prefill, then one compiled loop over an in-place KV cache."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag_mm.core import sharding
from rag_mm.decode import cache
from rag_mm.nn.decoder import Decoder
from rag_mm.nn.param_trees import Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw a token.

    `temperature` 0 takes the likeliest; `top_p` keeps the likeliest tokens that together reach this
    probability (Holtzman et al. 2020), 1 keeps all.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature is at least 0 and top_p in (0, 1], not {self.temperature} and {self.top_p}"
            )


class Prompts(NamedTuple):
    """A batch of prompts padded on the left; each int32 [B, T], `next_positions` int32 [B]."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array  # 0 for padding
    next_positions: jax.Array


class Sampled(NamedTuple):
    """What was drawn: tokens int32 [B, N] and their log-probabilities float32 [B, N], in nats.

    The log-probabilities are the model's own over the allowed tokens, before temperature and top-p.
    After `stop` a row holds `stop` with log-probability 0.
    """

    tokens: jax.Array
    log_probs: jax.Array


def sample(
    params: Params,
    prompts: Prompts,
    seeds: jax.Array,
    allowed: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    num_steps: int,
    sampling: Sampling,
    stop: int | None = None,
) -> Sampled:
    """Continues every prompt by `num_steps` tokens.

    A row's tokens depend on its own prompt and seed alone, not on the rest of the batch.

    Args:
        params, graphdef: the decoder.
        prompts: where to go on from.
        seeds: uint32 [B].
        allowed: bool [V], tokens that may be drawn.
        num_steps: N, at least 1.
        sampling: temperature and top-p.
        stop: token after which a row is finished, or None.

    Returns:
        Tokens and log-probabilities.
    """
    # Values, not constants of the program: another temperature compiles nothing.
    is_greedy = sampling.temperature == 0
    temperature = None if is_greedy else np.float32(sampling.temperature)
    top_p = None if is_greedy or sampling.top_p == 1 else np.float32(sampling.top_p)
    fixed = dict(graphdef=graphdef, num_steps=num_steps, stop=stop)
    return _sample(params, prompts, seeds, allowed, temperature, top_p, **fixed)


@partial(jax.jit, static_argnames=("graphdef", "num_steps", "stop"))
def _sample(
    params: Params,
    prompts: Prompts,
    seeds: jax.Array,
    allowed: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
    *,
    graphdef: nnx.GraphDef,
    num_steps: int,
    stop: int | None,
) -> Sampled:
    model: Decoder = nnx.merge(graphdef, params)
    batch, length = prompts.tokens.shape
    keys = jax.vmap(jax.random.key)(seeds)
    hidden, prefilled = model.prefill(prompts.tokens, prompts.positions, prompts.segment_ids)
    blocks = model.stack.unstack()
    segment_ids = jnp.pad(prompts.segment_ids, ((0, 0), (0, num_steps)), constant_values=1)
    draw = partial(_draw, allowed=allowed, temperature=temperature, top_p=top_p)
    ahead = prompts.next_positions[:, None] + jnp.arange(num_steps, dtype=jnp.int32)[None]
    # Inside the loop XLA would take every sine again for each head of each layer.
    turned = ahead, model.config.block.rotation(ahead)

    def body(i, carry):
        layers, token, out, finished = carry
        attend = cache.make_attend(jnp.int32(length) + i - 1, segment_ids)
        positions, rotation = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, i - 1, 1, axis=1), turned
        )
        hidden, layers = model.decode_step(
            blocks, token[:, None], positions, rotation, attend, layers
        )
        token, log_prob = draw(model.logits(hidden)[:, 0], _fold(keys, i))
        return layers, *_record(i, token, log_prob, out, finished, stop)

    tokens = sharding.place(jnp.zeros((batch, num_steps), jnp.int32), "batch", None)
    empty = Sampled(tokens, tokens.astype(jnp.float32))
    unfinished = sharding.place(jnp.zeros(batch, bool), "batch")
    first = draw(model.logits(hidden[:, -1:])[:, 0], _fold(keys, jnp.int32(0)))
    recorded = _record(jnp.int32(0), *first, empty, unfinished, stop)
    carry = (cache.make_cache(prefilled, num_steps), *recorded)
    return jax.lax.fori_loop(1, num_steps, body, carry)[2]


def _fold(keys: jax.Array, i: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)


def _draw(
    logits: jax.Array,
    keys: jax.Array,
    *,
    allowed: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One token a row from logits float32 [B, V]."""
    # Sorting and choosing need a row's logits on one device.
    logits = jnp.where(allowed[None], sharding.place(logits, "batch", None), -jnp.inf)
    log_probs = jax.nn.log_softmax(logits)
    if temperature is None:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        scaled = logits / temperature
        if top_p is not None:
            scaled = jnp.where(_nucleus(scaled, top_p), scaled, -jnp.inf)
        token = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    # A comparison, not a gather: rows may be split over devices.
    is_drawn = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == token[:, None]
    return token, jnp.where(is_drawn, log_probs, 0).sum(axis=1)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest set whose probability reaches top_p, with all that tie with its last: bool [B, V]."""
    probs = jax.nn.softmax(logits)
    descending = -jnp.sort(-probs, axis=-1)
    # Mass before each rank: the token that crosses the threshold still belongs.
    before = jnp.cumsum(descending, axis=-1) - descending
    least = jnp.where(before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return probs >= least


def _record(
    i: jax.Array,
    token: jax.Array,
    log_prob: jax.Array,
    out: Sampled,
    finished: jax.Array,
    stop: int | None,
) -> tuple[jax.Array, Sampled, jax.Array]:
    if stop is not None:
        token = jnp.where(finished, jnp.int32(stop), token)
        log_prob = jnp.where(finished, jnp.float32(0), log_prob)
        finished = finished | (token == stop)
    out = Sampled(out.tokens.at[:, i].set(token), out.log_probs.at[:, i].set(log_prob))
    return token, out, finished


def lower(
    *args: jax.ShapeDtypeStruct | Prompts,
    graphdef: nnx.GraphDef,
    num_steps: int,
    stop: int | None = None,
) -> jax.stages.Lowered:
    """`sample`'s program lowered on abstract arguments, for a plan; those of `_sample` in its order."""
    return _sample.lower(*args, graphdef=graphdef, num_steps=num_steps, stop=stop)
