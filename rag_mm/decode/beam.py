"""Beam search: the likeliest texts after prompts, as transformers finds them with `early_stopping=False`.

A step continues each of a prompt's K beams by every token and keeps the 2K likeliest continuations. Of the
first K of them those that end are candidates for the result; the K likeliest that go on are the next beams.
A candidate's score is its log-probability divided by its length to the power of `length_penalty`. A prompt's
search ends when its best beam, at its present length, scores below its K candidates.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float32, Int, Int32

from rag_mm.core import sharding
from rag_mm.decode import cache, decode_batch, token_choice
from rag_mm.decode.sampler import Prompts
from rag_mm.nn.decoder import Decoder
from rag_mm.nn.param_trees import Params

_NEVER = -1e9  # Added to the score of what cannot be chosen.


class Beams(NamedTuple):
    """The best continuations of each prompt, the best first.

    Attributes:
        tokens: ids, up to and with the stop token, which also fills the rest.
        scores: log-probability in nats / length ** length_penalty.
    """

    tokens: Int32[Array | np.ndarray, "B K num_steps"]
    scores: Float32[Array | np.ndarray, "B K"]


def search(
    params: Params,
    prompts: Prompts,
    allowed: Bool[Array | np.ndarray, " V"],
    *,
    graphdef: nnx.GraphDef,
    num_steps: int,
    stop: int,
    num_beams: int = 5,
    length_penalty: float = 1.0,
    min_steps: int = 0,
    is_scanned: bool | None = None,
) -> Beams:
    """The `num_beams` best continuations of every prompt, by at most `num_steps` tokens.

    Args:
        params: the decoder's parameters.
        prompts: the sequences to continue.
        allowed: which tokens may follow; log-probabilities are those over all tokens.
        graphdef: the decoder's structure.
        num_steps: at least 1; with another number another program is compiled.
        stop: token that ends a sequence.
        num_beams: K, at least 1.
        length_penalty: above 0 favors long texts, below 0 short ones.
        min_steps: tokens before `stop` may follow.
        is_scanned: whether a step scans the layers; None: where that is faster.

    Raises:
        ValueError: fewer than 2 * num_beams tokens may follow.
    """
    if np.asarray(allowed).sum() < 2 * num_beams:
        raise ValueError(f"{num_beams} beams need {2 * num_beams} allowed tokens or more")
    values = np.float32(length_penalty), np.int32(min_steps)
    sizes = dict(num_steps=num_steps, stop=stop, num_beams=num_beams, is_scanned=is_scanned)
    run = partial(_search, params, allowed=allowed, values=values, graphdef=graphdef, **sizes)
    mesh = decode_batch.mesh_of(params)
    if mesh is None:
        return run(prompts=prompts)
    return decode_batch.run_on_mesh(mesh, run, {"prompts": prompts})


class _BeamState(NamedTuple):
    """Beams that go on, and candidates that have ended; `can_improve` is one truth for each prompt."""

    running: Int32[Array, "B K T"]
    running_scores: Float32[Array, "B K"]
    ended: Int32[Array, "B K T"]
    ended_scores: Float32[Array, "B K"]
    has_ended: Bool[Array, "B K"]
    can_improve: Bool[Array, " B"]


@partial(jax.jit, static_argnames=("graphdef", "num_steps", "stop", "num_beams", "is_scanned"))
def _search(
    params: Params,
    *,
    prompts: Prompts,
    allowed: jax.Array,
    values: tuple[jax.Array, jax.Array],
    graphdef: nnx.GraphDef,
    num_steps: int,
    stop: int,
    num_beams: int,
    is_scanned: bool | None,
) -> Beams:
    model: Decoder = nnx.merge(graphdef, params)
    (penalty, min_steps), (batch_size, length) = values, prompts.positions.shape
    shape = batch_size * num_beams, length, num_steps
    blocks, is_scanned = cache.layers_of(model, shape, is_scanned)
    hidden, prefilled = model.prefill(
        prompts.tokens, prompts.positions, prompts.segment_ids, prompts.context
    )
    repeat = lambda x: token_choice.join_streams((x,) * num_beams)
    segment_ids = repeat(jnp.pad(prompts.segment_ids, ((0, 0), (0, num_steps)), constant_values=1))
    ahead = jnp.arange(num_steps, dtype=jnp.int32)[None]
    positions = repeat(prompts.next_positions)[:, None] + ahead
    placed = positions, model.config.block.rotation(positions)

    def advance(state: _BeamState, hidden: jax.Array, i: jax.Array, is_first: bool) -> tuple:
        rows = repeat(hidden) if is_first else hidden
        log_probs = jax.nn.log_softmax(model.logits(rows)[:, 0])
        may_stop = (i >= min_steps) | ~token_choice.is_token(jnp.int32(stop), allowed.shape[0])
        log_probs = jnp.where((allowed & may_stop)[None], log_probs, -jnp.inf)
        by_beam = _split(log_probs, num_beams, 0)
        return _advance(state, by_beam, i, penalty, stop)

    def step(carry: tuple) -> tuple:
        i, layers, token, state = carry
        index = jnp.int32(length) + i - 1
        position, rotation = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, i - 1, 1, axis=1), placed
        )
        attend = cache.make_attend(index, segment_ids, is_scanned)
        inputs = _join(token, 0)[:, None]
        hidden, kept = model.decode_step(blocks, inputs, position, rotation, attend, layers)
        layers = cache.write(layers, kept, index) if is_scanned else kept
        state, token, parents = advance(state, hidden, i, False)
        return i + 1, _follow(layers, parents, is_scanned), token, state

    state, token, _ = advance(
        _start(batch_size, num_beams, num_steps, stop), hidden[:, -1:], jnp.int32(0), True
    )
    layers = cache.make_cache(prefilled, num_steps, is_scanned)
    layers = jax.tree.map(lambda x: _repeat(x, num_beams, int(is_scanned)), layers)
    is_going_on = lambda carry: (carry[0] < num_steps) & carry[-1].can_improve.any()
    final = jax.lax.while_loop(is_going_on, step, (jnp.int32(1), layers, token, state))[-1]
    return Beams(final.ended, final.ended_scores)


def _start(batch_size: int, num_beams: int, num_steps: int, stop: int) -> _BeamState:
    """No candidates, and of all beams, which are alike before the first token, the first one alone."""
    tokens = jnp.full((batch_size, num_beams, num_steps), stop, jnp.int32)
    never = jnp.full((batch_size, num_beams), _NEVER, jnp.float32)
    state = _BeamState(
        tokens, never.at[:, 0].set(0), tokens, never, never > 0, jnp.ones(batch_size, bool)
    )
    return jax.tree.map(lambda x: sharding.place(x, "batch", *(None,) * (x.ndim - 1)), state)


@sharding.automatic("batch")
def _advance(
    state: _BeamState,
    log_probs: Float32[Array, "B K V"],
    i: Int[Array, ""],
    penalty: Float32[Array, ""],
    stop: int,
) -> tuple[_BeamState, Int32[Array, "B K"], Int32[Array, "B K"]]:
    """Step i's beams and candidates; also the beams' new tokens, and which beam each of them continues."""
    batch_size, num_beams, vocab_size = log_probs.shape
    total = (log_probs + state.running_scores[:, :, None]).reshape(batch_size, -1)
    scores, at = jax.lax.top_k(total, 2 * num_beams)
    parents, tokens = at // vocab_size, at % vocab_size
    continued = _choose(state.running, parents).at[:, :, i].set(tokens)
    ends = (tokens == stop) | (i == state.running.shape[2] - 1)

    running_scores, best = jax.lax.top_k(jnp.where(ends, scores + _NEVER, scores), num_beams)
    scale = jnp.power((i + 1).astype(jnp.float32), penalty)
    is_candidate = ends & (jnp.arange(2 * num_beams) < num_beams)[None]
    is_candidate &= state.can_improve[:, None]
    found = scores / scale + jnp.where(is_candidate, 0, _NEVER)
    ended_scores, kept = jax.lax.top_k(
        jnp.concatenate([state.ended_scores, found], axis=1), num_beams
    )
    merge = lambda old, new: _choose(jnp.concatenate([old, new], axis=1), kept)
    has_ended = merge(state.has_ended, is_candidate)
    worst = jnp.where(has_ended, ended_scores.min(axis=1, keepdims=True), _NEVER)
    can_improve = state.can_improve & (running_scores[:, :1] / scale > worst).any(axis=1)
    after = _BeamState(
        _choose(continued, best),
        running_scores,
        merge(state.ended, continued),
        ended_scores,
        has_ended,
        can_improve,
    )
    return after, _choose(tokens, best), _choose(parents, best)


def _choose(values: Array, at: Int[Array, "B K"]) -> Array:
    """values[b, at[b, k], ...]."""
    return jnp.take_along_axis(values, at.reshape(*at.shape, *(1,) * (values.ndim - 2)), axis=1)


def _follow(layers: Any, parents: Int32[Array, "B K"], is_scanned: bool) -> Any:
    """The cache in the order of the beams that go on; a product, so that every device keeps its part."""
    num_beams, axis = parents.shape[1], int(is_scanned)
    is_parent = token_choice.is_token(parents, num_beams)

    def follow(x: jax.Array) -> jax.Array:
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        chosen, spec = (
            is_parent.astype(dtype),
            "lbj...,bkj->lbk..." if is_scanned else "bj...,bkj->bk...",
        )
        moved = jnp.einsum(spec, _split(x, num_beams, axis).astype(dtype), chosen)
        return _join(moved, axis).astype(x.dtype)

    return jax.tree.map(follow, layers)


def _repeat(x: jax.Array, num_beams: int, axis: int) -> jax.Array:
    """Every row of `axis` `num_beams` times."""
    return _join(jnp.stack([x] * num_beams, axis=axis + 1), axis)


def _split(x: jax.Array, num_beams: int, axis: int) -> jax.Array:
    """Rows [B * K, ...] at `axis` as [B, K, ...], every device its own."""
    shape = (*x.shape[:axis], x.shape[axis] // num_beams, num_beams, *x.shape[axis + 1 :])
    return _reshape(x, shape, lambda spec: (*spec[: axis + 1], None, *spec[axis + 1 :]))


def _join(x: jax.Array, axis: int) -> jax.Array:
    """[B, K, ...] at `axis` as rows [B * K, ...]."""
    shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return _reshape(x, shape, lambda spec: (*spec[: axis + 1], *spec[axis + 2 :]))


def _reshape(x: jax.Array, shape: tuple[int, ...], lay_out: Any) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape)
    layout = PartitionSpec(*lay_out(tuple(jax.typeof(x).sharding.spec)))
    return jax.lax.reshape(x, shape, out_sharding=layout)
