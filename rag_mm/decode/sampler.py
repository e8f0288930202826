"""Sampling from a decoder: one prefill, then one compiled loop with a KV cache updated in place."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.decode import cache
from rag_mm.nn.decoder import Decoder
from rag_mm.nn.param_trees import Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample a token.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding.
        top_p: samples from the smallest set of most likely tokens with this total probability (nucleus
            sampling, Holtzman et al. 2020); 1 keeps all tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature must be at least 0 and top_p in (0, 1], not {self.temperature} and "
                f"{self.top_p}"
            )


def check_seed(seed: int) -> None:
    """Raises UserError unless `seed` is an integer of at least 0."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed is {seed!r}; give an integer of at least 0.")


class Prompts(NamedTuple):
    """A batch of prompts padded on the left, int32.

    Attributes:
        tokens: ids.
        positions: of the tokens.
        segment_ids: 1, and 0 for padding.
        next_positions: position of the first sampled token; later ones follow consecutively.
    """

    tokens: Int[Array | np.ndarray, "B T"]
    positions: Int[Array | np.ndarray, "B T"]
    segment_ids: Int[Array | np.ndarray, "B T"]
    next_positions: Int[Array | np.ndarray, " B"]


class SampledTokens(NamedTuple):
    """Sampled tokens and their log-probabilities in nats.

    Log-probabilities are the model's over the allowed tokens, before temperature and top-p. After the stop
    token, the rest of a sequence is `stop` with log-probability 0.
    """

    tokens: Int32[Array, "B num_steps"]
    log_probs: Float32[Array, "B num_steps"]


def sample(
    params: Params,
    prompts: Prompts,
    seeds: UInt32[Array | np.ndarray, " B"],
    allowed: Bool[Array | np.ndarray, " V"],
    *,
    graphdef: nnx.GraphDef,
    num_steps: int,
    sampling: Sampling,
    stop: int | None = None,
) -> SampledTokens:
    """Continues every prompt by `num_steps` tokens.

    A continuation depends only on its prompt and seed, not on the rest of the batch.

    Args:
        params: the decoder's parameters.
        prompts: the sequences to continue.
        seeds: one per prompt.
        allowed: which tokens may be sampled.
        graphdef: the decoder's structure.
        num_steps: at least 1.
        sampling: temperature and top-p.
        stop: token that ends a sequence, or None.
    """
    # Passed as values, not as constants of the program: another temperature needs no recompilation.
    is_greedy = sampling.temperature == 0
    temperature = None if is_greedy else np.float32(sampling.temperature)
    top_p = None if is_greedy or sampling.top_p == 1 else np.float32(sampling.top_p)
    static = dict(graphdef=graphdef, num_steps=num_steps, stop=stop)
    return _sample(params, prompts, seeds, allowed, temperature, top_p, **static)


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
) -> SampledTokens:
    model: Decoder = nnx.merge(graphdef, params)
    batch, length = prompts.tokens.shape
    keys = jax.vmap(jax.random.key)(seeds)
    hidden, prefilled = model.prefill(prompts.tokens, prompts.positions, prompts.segment_ids)
    blocks = model.stack.unstack()
    segment_ids = jnp.pad(prompts.segment_ids, ((0, 0), (0, num_steps)), constant_values=1)
    sample_token = partial(_sample_token, allowed=allowed, temperature=temperature, top_p=top_p)
    positions = prompts.next_positions[:, None] + jnp.arange(num_steps, dtype=jnp.int32)[None]
    # Inside the loop XLA would recompute every sine for each head of each layer.
    positions_and_rotations = positions, model.config.block.rotation(positions)

    def body(i, carry):
        layers, token, out, finished = carry
        attend = cache.make_attend(jnp.int32(length) + i - 1, segment_ids)
        position, rotation = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, i - 1, 1, axis=1), positions_and_rotations
        )
        hidden, layers = model.decode_step(
            blocks, token[:, None], position, rotation, attend, layers
        )
        token, log_prob = sample_token(model.logits(hidden)[:, 0], _fold(keys, i))
        return layers, *_record(i, token, log_prob, out, finished, stop)

    tokens = sharding.place(jnp.zeros((batch, num_steps), jnp.int32), "batch", None)
    empty = SampledTokens(tokens, tokens.astype(jnp.float32))
    unfinished = sharding.place(jnp.zeros(batch, bool), "batch")
    first = sample_token(model.logits(hidden[:, -1:])[:, 0], _fold(keys, jnp.int32(0)))
    after_first = _record(jnp.int32(0), *first, empty, unfinished, stop)
    carry = (cache.make_cache(prefilled, num_steps), *after_first)
    return jax.lax.fori_loop(1, num_steps, body, carry)[2]


def _fold(keys: jax.Array, i: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i)


def _sample_token(
    logits: jax.Array,
    keys: jax.Array,
    *,
    allowed: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One token per example, int32 [B], and its log-probability, from logits float32 [B, V]."""
    # Sorting and sampling need all of an example's logits on one device.
    logits = jnp.where(allowed[None], sharding.place(logits, "batch", None), -jnp.inf)
    log_probs = jax.nn.log_softmax(logits)
    if temperature is None:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        scaled = logits / temperature
        if top_p is not None:
            scaled = jnp.where(_nucleus(scaled, top_p), scaled, -jnp.inf)
        token = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    # A comparison, not a gather: the batch may be split over devices.
    is_sampled = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == token[:, None]
    return token, jnp.where(is_sampled, log_probs, 0).sum(axis=1)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest set of tokens whose probability reaches top_p, and ties with its last: bool [B, V]."""
    probs = jax.nn.softmax(logits)
    descending = -jnp.sort(-probs, axis=-1)
    # Probability before each rank: the token that crosses the threshold is still in the set.
    before = jnp.cumsum(descending, axis=-1) - descending
    lowest = jnp.where(before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return probs >= lowest


def _record(
    i: jax.Array,
    token: jax.Array,
    log_prob: jax.Array,
    out: SampledTokens,
    finished: jax.Array,
    stop: int | None,
) -> tuple[jax.Array, SampledTokens, jax.Array]:
    """Writes step i's token to `out`; returns the token, the new `out` and which examples are finished."""
    if stop is not None:
        token = jnp.where(finished, jnp.int32(stop), token)
        log_prob = jnp.where(finished, jnp.float32(0), log_prob)
        finished = finished | (token == stop)
    out = SampledTokens(out.tokens.at[:, i].set(token), out.log_probs.at[:, i].set(log_prob))
    return token, out, finished


def lower(
    *args: jax.ShapeDtypeStruct | Prompts,
    graphdef: nnx.GraphDef,
    num_steps: int,
    stop: int | None = None,
) -> jax.stages.Lowered:
    """Lowers `sample`'s program for abstract arguments, without compiling it.

    Args:
        args: the positional arguments of `_sample`: params, prompts, seeds, allowed, temperature, top_p.
        graphdef, num_steps, stop: as for `sample`.
    """
    return _sample.lower(*args, graphdef=graphdef, num_steps=num_steps, stop=stop)
