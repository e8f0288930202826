"""Sampling from a decoder: one prefill, then one compiled loop with a KV cache updated in place.

`sample(params, prompts, seeds, allowed, ...)` continues a batch of prompts. With S `Prompts` instead of one,
every example has S streams: prompts of their own, with their own positions and cache, that share every
sampled token (classifier-free guidance, contrastive decoding). A step

1. computes each stream's logits, float32 [S, B, V],
2. combines them: `combine(logits, allowed)` -> [B, V],
3. restricts them to the step's allowed tokens,
4. divides by the temperature, keeps the top-p nucleus, and samples,
5. records the token's log-probability under three distributions (`SampledTokens`).

Guidance with two streams, whose weight may change without another compilation:

    def guide(weight, logits, allowed):
        return weight * logits[0] + (1 - weight) * logits[1]

    combine = jax.tree_util.Partial(guide, jnp.float32(3))
    sampler.sample(params, [with_text, without_text], seeds, allowed, combine=combine, ...)

One program is compiled per batch size, longest prompt, `num_steps` and stop token; fewer steps than
`num_steps` (`limit`), other seeds, masks, temperatures and top-p reuse it. On a mesh, parameters and cache
are split by heads over `tensor`, examples over `data` and `fsdp`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.decode import cache, decode_batch, token_choice
from rag_mm.nn.block import Context
from rag_mm.nn.decoder import Decoder, Inputs
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
        tokens: ids; or any other inputs of the decoder, such as ids mixed with vectors.
        positions: of the tokens.
        segment_ids: 1, and 0 for padding.
        next_positions: position of the first sampled token; later ones follow consecutively.
        context: what the blocks of a decoder with `context_dim` read, of one length in all streams.
    """

    tokens: Inputs
    positions: Int[Array | np.ndarray, "B T"]
    segment_ids: Int[Array | np.ndarray, "B T"]
    next_positions: Int[Array | np.ndarray, " B"]
    context: Context | None = None


class SampledTokens(NamedTuple):
    """Sampled tokens and their log-probabilities in nats.

    After the stop token, the rest of a sequence is `stop` with log-probability 0.

    Attributes:
        tokens: ids.
        log_probs: under the combined logits (those of the model, for one stream) over the allowed tokens,
            before temperature and top-p.
        sampled_log_probs: under the distribution the token was sampled from; 0 for greedy decoding.
        stream_log_probs: under the unmodified model of each stream, over all tokens; None without `combine`,
            since a pass over the logits costs a small model 2 % of its speed.
    """

    tokens: Int32[Array | np.ndarray, "B num_steps"]
    log_probs: Float32[Array | np.ndarray, "B num_steps"]
    sampled_log_probs: Float32[Array | np.ndarray, "B num_steps"] | None = None
    stream_log_probs: Float32[Array | np.ndarray, "B S num_steps"] | None = None


# A mask for all steps or of each step; or a function of the step (traced int32) -> bool [V] or [B, V].
Allowed = Bool[Array | np.ndarray, " V"] | Bool[Array | np.ndarray, "num_steps V"] | Callable


def sample(
    params: Params,
    prompts: Prompts | Sequence[Prompts],
    seeds: UInt32[Array | np.ndarray, " B"],
    allowed: Allowed,
    *,
    graphdef: nnx.GraphDef,
    num_steps: int,
    sampling: Sampling,
    stop: int | None = None,
    combine: token_choice.Combine | None = None,
    limit: int | None = None,
    is_scanned: bool | None = None,
) -> SampledTokens:
    """Continues every prompt by `num_steps` tokens.

    A continuation depends only on its prompt and seed, not on the rest of the batch. If the parameters are
    split over a mesh, the batch is split over it too, padded to a multiple of its parts.

    Args:
        params: the decoder's parameters.
        prompts: the sequences to continue; several `Prompts` are streams that share the sampled tokens.
        seeds: one per example.
        allowed: which tokens may be sampled, at least one in every step: a mask, a mask per step, or a
            function of the step. A `jax.tree_util.Partial` of a module's function recompiles only for other
            shapes; a new lambda always does.
        graphdef: the decoder's structure.
        num_steps: at least 1.
        sampling: temperature and top-p.
        stop: token that ends a sequence, or None. The loop ends when all sequences have.
        combine: logits of all streams, and the step's allowed tokens -> logits to sample from
            (`guidance.Guidance.combine`); as with `allowed`, a `Partial` is reused.
        limit: number of steps to take, at most `num_steps`; None: all. Later columns are `stop`, or 0.
        is_scanned: whether a step scans the layers; None: where that is faster (`cache.scans_layers`).

    Raises:
        ValueError: a mask allows no token or has another number of steps, or several streams have no
            `combine`.
    """
    streams, values = prepare(prompts, allowed, num_steps, sampling, combine, limit)
    static = dict(graphdef=graphdef, num_steps=num_steps, stop=stop, is_scanned=is_scanned)
    run = partial(_sample, params, values=values, **static)
    mesh = decode_batch.mesh_of(params)
    if mesh is None:
        return run(streams=streams, seeds=seeds)
    return decode_batch.run_on_mesh(mesh, run, {"streams": streams, "seeds": seeds})


class Values(NamedTuple):
    """Arguments of the program that it does not depend on, apart from their shapes and which are None."""

    allowed: Any
    temperature: Any
    top_p: Any
    combine: Any = None
    limit: Any = None


def prepare(
    prompts: Prompts | Sequence[Prompts],
    allowed: Allowed,
    num_steps: int,
    sampling: Sampling,
    combine: token_choice.Combine | None,
    limit: int | None = None,
) -> tuple[tuple[Prompts, ...], Values]:
    """The streams and values of a decoding program, from arguments as of `sample`; raises as it does."""
    streams = (prompts,) if isinstance(prompts, Prompts) else tuple(prompts)
    if combine is None and len(streams) != 1:
        raise ValueError(f"give `combine` for {len(streams)} streams")
    if isinstance(allowed, np.ndarray) and not allowed.any(axis=-1).all():
        raise ValueError("every step needs at least one allowed token")
    if not callable(allowed) and allowed.ndim == 2 and len(allowed) != num_steps:
        raise ValueError(f"there are {len(allowed)} masks for {num_steps} steps")
    # Passed as values, not as constants of the program: another temperature needs no recompilation.
    is_greedy = sampling.temperature == 0
    values = Values(
        _traceable(allowed),
        None if is_greedy else np.float32(sampling.temperature),
        None if is_greedy or sampling.top_p == 1 else np.float32(sampling.top_p),
        _traceable(combine),
        None if limit is None else np.int32(limit),
    )
    return streams, values


def _traceable(function: Any) -> Any:
    """A function as an argument of a compiled one; anything else as it is."""
    is_plain = callable(function) and not isinstance(function, jax.tree_util.Partial)
    return jax.tree_util.Partial(function) if is_plain else function


@partial(jax.jit, static_argnames=("graphdef", "num_steps", "stop", "is_scanned"))
def _sample(
    params: Params,
    streams: tuple[Prompts, ...],
    seeds: jax.Array,
    values: Values,
    *,
    graphdef: nnx.GraphDef,
    num_steps: int,
    stop: int | None,
    is_scanned: bool | None,
) -> SampledTokens:
    model: Decoder = nnx.merge(graphdef, params)
    prompts, num_streams = join_prompts(streams), len(streams)
    batch_size, length = prompts.positions.shape
    blocks, is_scanned = cache.layers_of(model, (batch_size, length, num_steps), is_scanned)
    keys = jax.vmap(jax.random.key)(seeds)
    hidden, prefilled = model.prefill(
        prompts.tokens, prompts.positions, prompts.segment_ids, prompts.context
    )
    segment_ids = jnp.pad(prompts.segment_ids, ((0, 0), (0, num_steps)), constant_values=1)
    positions = prompts.next_positions[:, None] + jnp.arange(num_steps, dtype=jnp.int32)[None]
    # Inside the loop XLA would recompute every sine for each head of each layer.
    positions_and_rotations = positions, model.config.block.rotation(positions)

    def choose(hidden: jax.Array, i: jax.Array) -> token_choice.Choice:
        return token_choice.choose(
            token_choice.split_streams(model.logits(hidden)[:, 0], num_streams),
            jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i),
            token_choice.allowed_at(values.allowed, i),
            combine=values.combine,
            temperature=values.temperature,
            top_p=values.top_p,
        )

    def step(carry: tuple) -> tuple:
        i, layers, token, out, finished = carry
        index = jnp.int32(length) + i - 1
        position, rotation = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, i - 1, 1, axis=1), positions_and_rotations
        )
        hidden, kept = model.decode_step(
            blocks,
            token_choice.join_streams((token,) * num_streams)[:, None],
            position,
            rotation,
            cache.make_attend(index, segment_ids, is_scanned),
            layers,
        )
        layers = cache.write(layers, kept, index) if is_scanned else kept
        return i + 1, layers, *_record(i, choose(hidden, i), out, finished, stop)

    def is_going_on(carry: tuple) -> jax.Array:
        i, finished = carry[0], carry[-1]
        within = i < (num_steps if values.limit is None else values.limit)
        return within if stop is None else within & ~finished.all()

    start = jnp.int32(0)
    unfinished = sharding.place(jnp.zeros(len(seeds), bool), "batch")
    shape = (len(seeds), num_streams, num_steps)
    empty = make_empty(shape, stop, values.combine is not None)
    after_first = _record(start, choose(hidden[:, -1:], start), empty, unfinished, stop)
    layers = cache.make_cache(prefilled, num_steps, is_scanned)
    return jax.lax.while_loop(is_going_on, step, (start + 1, layers, *after_first))[3]


def join_prompts(streams: tuple[Prompts, ...]) -> Prompts:
    """The prompts of all streams as one batch, an example's streams next to each other."""
    longest = max(prompts.positions.shape[1] for prompts in streams)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (longest - x.shape[1], 0), *((0, 0),) * (x.ndim - 2)))

    def pad_left(prompts: Prompts) -> Prompts:
        tokens, positions, segment_ids = jax.tree.map(pad, prompts[:3])
        return prompts._replace(tokens=tokens, positions=positions, segment_ids=segment_ids)

    join = lambda *arrays: token_choice.join_streams(arrays)
    return jax.tree.map(join, *map(pad_left, streams))


def make_empty(shape: tuple[int, int, int], stop: int | None, has_streams: bool) -> SampledTokens:
    """What is left where no step is taken; `shape` is [B, S, num_steps]."""
    of_streams = sharding.place(jnp.zeros(shape, jnp.float32), "batch", None, None)
    zeros = of_streams[:, 0]
    tokens = jnp.full_like(zeros, 0 if stop is None else stop, jnp.int32)
    return SampledTokens(tokens, zeros, zeros, of_streams if has_streams else None)


def _record(
    i: jax.Array,
    choice: token_choice.Choice,
    out: SampledTokens,
    finished: jax.Array,
    stop: int | None,
) -> tuple[jax.Array, SampledTokens, jax.Array]:
    """Writes step i's token to `out`; returns the token, the new `out` and which examples are finished."""
    token = choice.token
    if stop is not None:
        keep = lambda x: jnp.where(finished if x.ndim == 1 else finished[:, None], 0, x)
        token = jnp.where(finished, jnp.int32(stop), token)
        choice = jax.tree.map(keep, choice)._replace(token=token)
        finished = finished | (token == stop)
    written = jax.tree.map(lambda x, to: to.at[..., i].set(x), tuple(choice), tuple(out))
    return token, SampledTokens(*written), finished


def lower(
    *args: Params | jax.ShapeDtypeStruct | Prompts,
    graphdef: nnx.GraphDef,
    num_steps: int,
    stop: int | None = None,
    is_scanned: bool | None = None,
) -> jax.stages.Lowered:
    """Lowers `sample`'s program for abstract arguments, without compiling it.

    Args:
        args: params, prompts of one stream, seeds, allowed, temperature, top_p.
        graphdef, num_steps, stop, is_scanned: as for `sample`.
    """
    params, prompts, seeds, *values = args
    return _sample.lower(
        params,
        (prompts,),
        seeds,
        Values(*values),
        graphdef=graphdef,
        num_steps=num_steps,
        stop=stop,
        is_scanned=is_scanned,
    )
