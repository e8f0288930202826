"""Log-probabilities of the last tokens of many texts, by a decoder.

The beginning that all texts share is prefilled once into a KV cache; the rest is packed as a tree
(`token_tree`). The head is applied only where a token counts. A program is compiled per pair of buckets: the
padded lengths of the shared beginning and of a chunk.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int

from rag_mm.core import batches, sharding
from rag_mm.decode import decode_batch
from rag_mm.frozen_lm import token_tree
from rag_mm.frozen_lm.token_tree import Chunk, Row
from rag_mm.nn.block import Heads
from rag_mm.nn.decoder import Decoder
from rag_mm.nn.param_trees import Params

HEAD_BATCH, HEAD_MULTIPLE = 64, 8
"""Hidden states that the head is applied to at once, at most; their number is a multiple of the second."""
WHOLE_BATCH = 16
"""Rows computed at once by a decoder with smeared heads, whose rows are not packed."""


def log_probs(
    graphdef: nnx.GraphDef, params: Params, rows: Sequence[Row], first_position: int = 0
) -> Float32[np.ndarray, " R"]:
    """The sum of the log-probabilities, in nats, of each row's tokens from its `start` on.

    Equal, but for rounding, to what the logits of each whole row give.

    Args:
        graphdef, params: the decoder.
        rows: the texts' ids, each below the vocabulary's size, of at most max_seq_len - first_position.
        first_position: of the first token of a row; the others follow.
    """
    mesh = decode_batch.mesh_of(params)
    config = nnx.merge(graphdef, params).config
    is_packed = not config.smear_lags
    trunk = token_tree.trunk_of(rows) if is_packed else ()
    cached = None
    if trunk:
        tokens = np.zeros((decode_batch.parts_of(mesh), token_tree.bucket(len(trunk))), np.int32)
        tokens[:, : len(trunk)] = trunk
        prefill = functools.partial(_prefill, params, jnp.int32(first_position), graphdef=graphdef)
        cached = _run(mesh, prefill, tokens=tokens)
    chunks = list(token_tree.chunks(rows, len(trunk), token_tree.BUCKETS[-1] if is_packed else 1))
    size = 1 if is_packed else WHOLE_BATCH
    states, targets = [], []
    for numbers in batches.split(len(chunks), size, decode_batch.parts_of(mesh)):
        batch = _stack([chunks[i] for i in numbers], first_position)
        if is_packed:
            del batch["segment_ids"]
            batch["mask"] = _mask([chunks[i] for i in numbers], batch, len(trunk), cached)
            compute = functools.partial(_extend, params, cached=cached, graphdef=graphdef)
        else:
            compute = functools.partial(_whole, params, graphdef=graphdef)
        hidden = np.asarray(_run(mesh, compute, **batch))
        for i, part in {int(i): part for part, i in enumerate(numbers)}.items():
            states.append(hidden[part, [target.after for target in chunks[i].targets]])
            targets += chunks[i].targets
    head = functools.partial(_head, params, graphdef=graphdef)
    found = _apply_head(functools.partial(_run, mesh, head), np.concatenate(states), targets)
    total = np.zeros(len(rows), np.float64)
    np.add.at(total, [target.row for target in targets], found)
    return total.astype(np.float32)


def _run(mesh: Mesh | None, compute: Callable[..., Any], **batch: np.ndarray) -> Any:
    return compute(**batch) if mesh is None else decode_batch.run_on_mesh(mesh, compute, batch)


def _stack(chunks: Sequence[Chunk], first_position: int) -> dict[str, np.ndarray]:
    """Tokens, positions and segment ids, int32 [B, T], padded on the right to a bucket."""
    length = token_tree.bucket(max(len(chunk.tokens) for chunk in chunks))
    tokens, positions, segment_ids = np.zeros((3, len(chunks), length), np.int32)
    for row, chunk in enumerate(chunks):
        count = len(chunk.tokens)
        tokens[row, :count] = chunk.tokens
        positions[row, :count] = chunk.depths + first_position
        segment_ids[row, :count] = 1
    return {"tokens": tokens, "positions": positions, "segment_ids": segment_ids}


def _mask(
    chunks: Sequence[Chunk], batch: dict[str, np.ndarray], num_shared: int, cached: Heads | None
) -> np.ndarray:
    """What the chunks' tokens see, bool [B, T, C + T], of the C padded tokens of the trunk and their own."""
    num_rows, length = batch["tokens"].shape
    size = 0 if cached is None else cached.k.shape[2]
    mask = np.zeros((num_rows, length, size + length), bool)
    mask[:, :, :num_shared] = True
    for row, chunk in enumerate(chunks):
        mask[row, :, size:] = chunk.mask(length)
    return mask


def _apply_head(
    head: Callable[..., jax.Array],
    states: Float[np.ndarray, "P D"],
    targets: Sequence[token_tree.Target],
) -> Float32[np.ndarray, " P"]:
    """The log-probability of each target after its state; equal states are next to each other."""
    # One state may have several targets: one-token answers to the same question.
    is_new = np.array([True, *(states[1:] != states[:-1]).any(axis=1)])
    unique, place = states[is_new], np.cumsum(is_new) - 1
    found = np.empty(len(targets), np.float32)
    tokens = np.array([target.token for target in targets])
    for numbers in batches.split(len(unique), HEAD_BATCH, HEAD_MULTIPLE):
        log_probs = np.asarray(head(hidden=unique[numbers][:, None]))
        here = (place >= numbers[0]) & (place <= numbers[-1])
        found[here] = log_probs[place[here] - numbers[0], tokens[here]]
    return found


@functools.partial(jax.jit, static_argnames="graphdef")
def _prefill(
    params: Params,
    first_position: Int[Array, ""],
    tokens: Int[Array | np.ndarray, "B C"],
    graphdef: nnx.GraphDef,
) -> Heads:
    model: Decoder = nnx.merge(graphdef, params)
    tokens = jnp.asarray(tokens)
    count = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # Padding is behind the tokens, so that none of them sees it.
    last = model.config.max_seq_len - 1
    positions = jnp.zeros_like(tokens) + jnp.minimum(first_position + count, last)
    return model.prefill(tokens, positions, jnp.ones_like(tokens))[1]


@functools.partial(jax.jit, static_argnames="graphdef")
def _extend(
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"],
    mask: Bool[Array | np.ndarray, "B T S"],
    cached: Heads | None,
    graphdef: nnx.GraphDef,
) -> Float[Array, "B T D"]:
    model: Decoder = nnx.merge(graphdef, params)
    return model.extend(tokens, positions, mask, cached)


@functools.partial(jax.jit, static_argnames="graphdef")
def _whole(
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"],
    graphdef: nnx.GraphDef,
) -> Float[Array, "B T D"]:
    model: Decoder = nnx.merge(graphdef, params)
    return model(tokens, positions, segment_ids)


@functools.partial(jax.jit, static_argnames="graphdef")
def _head(
    params: Params, hidden: Float[Array | np.ndarray, "P 1 D"], graphdef: nnx.GraphDef
) -> Float32[Array, "P V"]:
    model: Decoder = nnx.merge(graphdef, params)
    logits = sharding.place(model.logits(jnp.asarray(hidden))[:, 0], "batch", None)
    return jax.nn.log_softmax(logits)
