"""Speculative Jacobi decoding: many tokens a pass, distributed as those of sequential sampling.

Teng et al. (2024, arXiv 2410.01699), with drafts coupled from pass to pass as in So et al. (2025, arXiv
2510.24211). The tokens of all steps are drafts at first. A pass decodes all drafts at once behind the cached
prompt, which gives each position's distribution p after the drafts before it. A draft x was drawn from a
known distribution q: it is kept with probability min(1, p(x) / q(x)) and otherwise replaced by a token of
(p - q)+, normalized. The token that results is distributed as p, and differs from x as seldom as that allows
(a maximal coupling).

Up to and including the first position that is not kept, only final tokens precede a position: p is the
model's distribution there, and the token is final. Later tokens are the drafts of the next pass, whose q is
this pass's p. Every pass makes at least one token final. Whatever the first drafts, tokens have the
distribution of `sampler.sample`'s, also with top-p, allowed tokens and streams; greedy ones are the same.

A pass costs about as much as reading a prompt of as many tokens. That is fast where a single token leaves an
accelerator idle; a CPU gains nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from rag_mm.core import sharding
from rag_mm.decode import cache, decode_batch, sampler, token_choice
from rag_mm.decode.sampler import Prompts, SampledTokens
from rag_mm.nn.decoder import Decoder
from rag_mm.nn.param_trees import Params


def sample(
    params: Params,
    prompts: Prompts | Sequence[Prompts],
    seeds: UInt32[Array | np.ndarray, " B"],
    allowed: sampler.Allowed,
    *,
    graphdef: nnx.GraphDef,
    num_steps: int,
    sampling: sampler.Sampling,
    combine: token_choice.Combine | None = None,
    is_coupled: bool = True,
    drafts: Int[Array | np.ndarray, "B num_steps"] | None = None,
    is_scanned: bool | None = None,
) -> tuple[SampledTokens, Int32[Array | np.ndarray, " B"]]:
    """Continues every prompt by `num_steps` tokens, in as few passes as the drafts allow.

    Like `sampler.sample`, without a stop token: a continuation depends only on its prompt, seed and drafts;
    other seeds, masks, temperatures and top-p reuse the compiled program.

    Args:
        params, prompts, seeds, allowed, graphdef, num_steps, sampling, combine, is_scanned: as for
            `sampler.sample`.
        is_coupled: whether positions after the first that was not kept keep their drafts where they can;
            otherwise they are drawn again.
        drafts: the first drafts; that of the first position is not read, since the prompt gives its token.
            None: drawn from the allowed tokens, all equally likely.

    Returns:
        The tokens, and the number of passes until all of an example's tokens were final: at most
        num_steps - 1, the steps of sequential sampling after the prompt.

    Raises:
        ValueError: as `sampler.sample`, or there are not B x num_steps drafts.
    """
    streams, values = sampler.prepare(prompts, allowed, num_steps, sampling, combine)
    if drafts is not None and drafts.shape != (len(seeds), num_steps):
        raise ValueError(
            f"drafts are {drafts.shape}; give {num_steps} for each of {len(seeds)} examples"
        )
    if num_steps == 1:
        alone = dict(graphdef=graphdef, num_steps=1, sampling=sampling, combine=combine)
        sampled = sampler.sample(params, prompts, seeds, allowed, is_scanned=is_scanned, **alone)
        return sampled, np.zeros(len(seeds), np.int32)
    drafts = None if drafts is None else drafts.astype(np.int32)
    batch = {"streams": streams, "seeds": seeds, "drafts": drafts}
    static = dict(
        graphdef=graphdef, num_steps=num_steps, is_coupled=is_coupled, is_scanned=is_scanned
    )
    run = partial(_sample, params, values=values, **static)
    mesh = decode_batch.mesh_of(params)
    return run(**batch) if mesh is None else decode_batch.run_on_mesh(mesh, run, batch)


class _State(NamedTuple):
    """The loop's state. M positions follow the first, whose token is final before the first pass.

    Attributes:
        index: of the next pass.
        out: tokens, final ones before drafts, and their log-probabilities in the last pass.
        drawn_from: probabilities that each draft was drawn from.
        num_final: how many of the M tokens are final.
        passes: taken so far for each example.
    """

    index: Int32[Array, ""]
    out: SampledTokens
    drawn_from: Float32[Array, "B M V"]
    num_final: Int32[Array, " B"]
    passes: Int32[Array, " B"]


@partial(jax.jit, static_argnames=("graphdef", "num_steps", "is_coupled", "is_scanned"))
def _sample(
    params: Params,
    streams: tuple[Prompts, ...],
    seeds: jax.Array,
    drafts: jax.Array | None,
    values: sampler.Values,
    *,
    graphdef: nnx.GraphDef,
    num_steps: int,
    is_coupled: bool,
    is_scanned: bool | None,
) -> tuple[SampledTokens, jax.Array]:
    model: Decoder = nnx.merge(graphdef, params)
    decode, hidden = _prefill(model, streams, num_steps, is_scanned)
    key = jax.vmap(jax.random.key)(seeds)
    keys_at = lambda i: jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, i)
    how = dict(combine=values.combine, temperature=values.temperature, top_p=values.top_p)
    has_streams, num_later = values.combine is not None, num_steps - 1
    logits = token_choice.split_streams(model.logits(hidden)[:, 0], len(streams))
    allowed = token_choice.allowed_at(values.allowed, jnp.int32(0))
    first = token_choice.choose(logits, keys_at(0), allowed, **how)
    later = jnp.arange(1, num_steps, dtype=jnp.int32)
    allowed = jax.vmap(token_choice.allowed_at, (None, 0), 1)(values.allowed, later)

    def run_pass(state: _State) -> _State:
        tokens = jnp.concatenate([first.token[:, None], state.out.tokens[:, :-1]], axis=1)
        logits = decode(tokens)
        scores = jax.vmap(partial(token_choice.score, **how), (2, 1), 1)(logits, allowed)
        probs = _probabilities(scores)
        keys = keys_at(2 * state.index + 2), keys_at(2 * state.index + 3)
        tokens, num_final = _couple(keys, state, probs, is_coupled)
        recorded = jax.vmap(token_choice.record, (1, 1, 2), -1)(
            tokens, scores, logits if has_streams else None
        )
        passes = state.passes + (state.num_final < num_later).astype(jnp.int32)
        return _State(state.index + 1, SampledTokens(*recorded), probs, num_final, passes)

    drafts, drawn_from = _first_drafts(drafts, keys_at(1), allowed)
    out = sampler.make_empty((len(seeds), len(streams), num_later), None, has_streams)
    none = jnp.zeros_like(first.token)
    start = _State(jnp.int32(0), out._replace(tokens=drafts), drawn_from, none, none)
    is_going_on = lambda state: (state.num_final < num_later).any()
    end = jax.lax.while_loop(is_going_on, run_pass, start)
    # An example's last pass keeps all drafts but perhaps the last, so its log-probabilities are final too.
    join = lambda one, others: jnp.concatenate([one[..., None], others], axis=-1)
    return SampledTokens(*jax.tree.map(join, tuple(first), tuple(end.out))), end.passes


def _prefill(
    model: Decoder, streams: tuple[Prompts, ...], num_steps: int, is_scanned: bool | None
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Reads the prompts.

    Returns:
        A function from tokens [B, M] after the prompts, M = num_steps - 1, to the logits [S, B, M, V] of what
        follows each of them; the last hidden states of the prompts, [R, 1, D].
    """
    prompts, num_streams, num_tokens = sampler.join_prompts(streams), len(streams), num_steps - 1
    batch_size, length = prompts.positions.shape
    blocks, is_scanned = cache.layers_of(model, (batch_size, length, num_steps), is_scanned)
    hidden, prefilled = model.prefill(
        prompts.tokens, prompts.positions, prompts.segment_ids, prompts.context
    )
    layers = cache.make_cache(prefilled, num_tokens, is_scanned)
    segment_ids = jnp.pad(prompts.segment_ids, ((0, 0), (0, num_tokens)), constant_values=1)
    positions = prompts.next_positions[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]
    rotation = model.config.block.rotation(positions)
    attend = cache.make_attend(jnp.int32(length), segment_ids, is_scanned)

    def decode(tokens: jax.Array) -> jax.Array:
        rows = token_choice.join_streams((tokens,) * num_streams)
        # What it writes to the cache is not kept: the next pass has other tokens in its place.
        hidden, _ = model.decode_step(blocks, rows, positions, rotation, attend, layers)
        return token_choice.split_streams(model.logits(hidden), num_streams)

    return decode, hidden[:, -1:]


def _first_drafts(
    drafts: jax.Array | None, keys: jax.Array, allowed: Bool[Array, "#B M V"]
) -> tuple[Int32[Array, "B M"], Float32[Array, "B M V"]]:
    """The drafts of the first pass and the probabilities that they were drawn from; a given one has all."""
    if drafts is not None:
        drafts = drafts[:, 1:]
        return drafts, token_choice.is_token(drafts, allowed.shape[-1]).astype(jnp.float32)
    probs = jax.nn.softmax(jnp.where(allowed, jnp.float32(0), -jnp.inf))
    probs = jnp.broadcast_to(probs, (len(keys), *probs.shape[1:]))
    probs = sharding.place(probs, "batch", None, None)
    return _draw(keys, probs), probs


def _probabilities(scores: token_choice.Scores) -> Float32[Array, "B M V"]:
    """What a token is sampled from; one of them has all if greedy."""
    if scores.sampled is not None:
        return jax.nn.softmax(scores.sampled)
    best = jnp.argmax(scores.combined, axis=-1).astype(jnp.int32)
    return token_choice.is_token(best, scores.combined.shape[-1]).astype(jnp.float32)


def _draw(keys: jax.Array, weights: Float32[Array, "B M V"]) -> Int32[Array, "B M"]:
    return jax.vmap(jax.random.categorical)(keys, jnp.log(weights)).astype(jnp.int32)


def _couple(
    keys: tuple[jax.Array, jax.Array],
    state: _State,
    probs: Float32[Array, "B M V"],
    is_coupled: bool,
) -> tuple[Int32[Array, "B M"], Int32[Array, " B"]]:
    """Tokens distributed as `probs`, from drafts; and how many are final now."""
    drafts = state.out.tokens
    is_draft = token_choice.is_token(drafts, probs.shape[-1])
    pick = lambda p: jnp.where(is_draft, p, 0).sum(axis=-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, drafts.shape[1:]))(keys[0])
    position = jnp.arange(drafts.shape[1], dtype=jnp.int32)[None]
    is_kept = position < state.num_final[:, None]
    is_kept |= _is_accepted(uniform, pick(probs), pick(state.drawn_from))
    num_refused = jnp.cumsum((~is_kept).astype(jnp.int32), axis=1)
    is_final = jnp.where(is_kept, num_refused, num_refused - 1) == 0
    rest = jnp.maximum(probs - state.drawn_from, 0)
    if not is_coupled:
        is_kept &= is_final
        rest = jnp.where(is_final[..., None], rest, probs)
    # Without rounding, no draft is refused where nothing is left.
    rest = jnp.where((rest > 0).any(axis=-1, keepdims=True), rest, probs)
    tokens = jnp.where(is_kept, drafts, _draw(keys[1], rest))
    return tokens, is_final.sum(axis=1, dtype=jnp.int32)


def _is_accepted(
    uniform: Float32[Array, "B M"], p: Float32[Array, "B M"], q: Float32[Array, "B M"]
) -> Bool[Array, "B M"]:
    """True with probability min(1, p / q), for drafts of probability q, now p; never where p is 0."""
    return uniform * q < p
